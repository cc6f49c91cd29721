#!/usr/bin/env bash
# Acceptance on real weights: checks the files, compares with diffusers, trains, resumes, edits, compares the speed with DiffSynth, writes a page.
#
#   bash scripts/accept.sh [MODEL]        MODEL is 2511 (the default), 2509, a folder or a hub id; see --help
#
# NPROC: number of processes that train, with one GPU each; by default 1.
set -euo pipefail
exec python "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/acceptance/accept.py" "$@"
