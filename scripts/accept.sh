#!/usr/bin/env bash
# Acceptance on real weights: checks the files, compares with diffusers, trains, resumes, edits, races DiffSynth; ends with a page.
#
#   bash scripts/accept.sh [MODEL]        2511 by default; 2509, a folder, a hub id; --help says more
#
# NPROC: processes that train, one GPU each; by default 1.
set -euo pipefail
exec python "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/acceptance/accept.py" "$@"
