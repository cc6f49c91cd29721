#!/usr/bin/env bash
# Builds the documentation as a website with a search, in outputs/docs/. A broken link or heading, or a page that is missing from
# the menu, is an error. MkDocs gets its own environment, and the project's is not changed.
#   bash scripts/docs.sh                # build
#   bash scripts/docs.sh serve          # build, show at http://127.0.0.1:8000, and build again after each change
set -euo pipefail
cd "$(dirname "$0")/.."

command=${1:-build}
[[ $# -eq 0 ]] || shift
export NO_MKDOCS_2_WARNING=1  # a notice of the theme's about another program
export UV_COMPILE_BYTECODE=0  # of packages that run for two seconds
exec uv run --isolated --only-group docs mkdocs "$command" --strict --config-file scripts/mkdocs.yml "$@"
