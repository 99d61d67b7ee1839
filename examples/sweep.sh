#!/usr/bin/env bash
# A small sweep of the study, and one page of it: sweep/report.md, sweep/report.html, pictures.
set -euo pipefail
export MUTER_CACHE=${MUTER_CACHE:-sweep/cache}
muter-experiment -m experiment=quick seed=0,1 hydra.sweep.dir=sweep
muter-report sweep
