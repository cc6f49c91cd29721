// What Gradio's components do not do: a shortcut, scrolling to the result, messages that end with the next result, and one zoom
// for both sides of a comparison.
"use strict";

const editPage = {
  NARROW: matchMedia("(max-width: 859px)"), // as in style.css: the result is below what was pressed

  show(selector) {
    const place = document.querySelector(selector);
    const scroll = () => {
      const { top } = place.getBoundingClientRect();
      if (this.NARROW.matches || top < 0 || top > innerHeight / 2) place.scrollIntoView({ block: "start" });
    };
    scroll();
    // Progress makes the place higher, which may push it up, where it is stuck to the end of the page.
    new MutationObserver((changes, observer) => {
      if (!place.querySelector(".told")) return;
      observer.disconnect();
      scroll();
    }).observe(place, { childList: true, subtree: true });
  },

  closeErrors() {
    for (const close of document.querySelectorAll(":is(.toast-body.error, .toast-body.warning) .toast-close")) close.click();
  },

  // Shift of the pictures in shares of their own sides, and how much larger they are than whole.
  zoom: { x: 0, y: 0, scale: 1 },
  MOST: 16,

  newPair() {
    this.closeErrors();
    this.zoomTo({ x: 0, y: 0, scale: 1 });
  },

  zoomTo({ x, y, scale }) {
    const within = (share) => Math.min(0, Math.max(1 - scale, share));
    this.zoom = { x: within(x), y: within(y), scale };
    document.querySelector("#sides").classList.toggle("zoomed", scale > 1);
    for (const image of document.querySelectorAll("#sides img")) {
      image.style.transform = `translate(${100 * this.zoom.x}%, ${100 * this.zoom.y}%) scale(${scale})`;
    }
  },

  // Makes both `factor` times larger; what is under the point of `image` stays under it.
  zoomAt(image, clientX, clientY, factor) {
    const box = image.getBoundingClientRect();
    const { x, y, scale } = this.zoom;
    const larger = Math.min(this.MOST, Math.max(1, scale * factor));
    const [u, v] = [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
    this.zoomTo({ x: x + u * (scale - larger), y: y + v * (scale - larger), scale: larger });
  },

  moveBy(image, dx, dy) {
    const { x, y, scale } = this.zoom;
    const box = image.getBoundingClientRect();
    this.zoomTo({ x: x + (dx * scale) / box.width, y: y + (dy * scale) / box.height, scale });
  },
};

// Gradio's own shortcut is Shift+Enter; people expect Ctrl+Enter, and Cmd+Enter on a Mac.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#instruction")) {
    event.preventDefault();
    event.target.dispatchEvent(new Event("input", { bubbles: true }));
    setTimeout(() => document.querySelector("#run").click(), 50);
  }
});

const sideOf = (event) => event.target.closest?.("#sides img");
const pointers = new Map(); // those that are down on a side

document.addEventListener(
  "wheel",
  (event) => {
    const image = sideOf(event);
    if (!image) return;
    event.preventDefault();
    editPage.zoomAt(image, event.clientX, event.clientY, Math.exp(-event.deltaY / 400));
  },
  { passive: false },
);

document.addEventListener("pointerdown", (event) => {
  if (!sideOf(event)) return;
  if (event.pointerType === "mouse") event.preventDefault(); // else the browser drags the picture away
  pointers.set(event.pointerId, event);
});

document.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const image = before.target;
  const others = [...pointers.values()].filter((each) => each.pointerId !== event.pointerId);
  pointers.set(event.pointerId, { pointerId: event.pointerId, target: image, clientX: event.clientX, clientY: event.clientY });
  if (others.length) {
    const away = (each) => Math.hypot(each.clientX - others[0].clientX, each.clientY - others[0].clientY);
    const [x, y] = [(event.clientX + others[0].clientX) / 2, (event.clientY + others[0].clientY) / 2];
    editPage.zoomAt(image, x, y, away(event) / Math.max(1, away(before)));
  } else {
    editPage.moveBy(image, event.clientX - before.clientX, event.clientY - before.clientY);
  }
});

for (const end of ["pointerup", "pointercancel"]) {
  document.addEventListener(end, (event) => pointers.delete(event.pointerId));
}

document.addEventListener("dblclick", (event) => {
  if (sideOf(event)) editPage.zoomTo({ x: 0, y: 0, scale: 1 });
});
