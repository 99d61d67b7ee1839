#!/usr/bin/env bash
# From a checkpoint that somebody trained to a deletion that can be proved. Run in this folder.
set -euo pipefail

# 1. Training: a script that knows nothing of all this. It leaves digits.ckpt.
python train.py

# 2. Who is in the training set: row i of ids.csv is the user of sample i (six samples each).
python -c 'print("user"); [print(f"user{i // 6:03d}") for i in range(1200)]' >ids.csv

# 3. Once per training: what unlearning needs to know, stored beside the checkpoint.
muter snapshot --config config.yaml --config threat.yaml --ckpt_path digits.ckpt

# 4. Requests, by user or by row. The first one is only tried.
printf 'user017\nuser101\n' >requests.txt
muter unlearn --config config.yaml --ckpt_path digits.ckpt --forget.ids requests.txt --forget.table ids.csv \
  --forget.column user --dry_run true
muter unlearn --config config.yaml --ckpt_path digits.ckpt --forget.ids requests.txt --forget.table ids.csv \
  --forget.column user --request_id ticket-4711
muter unlearn --config config.yaml --ckpt_path digits.ckpt --forget.indices [3,17] --refine 2

# 5. Evidence, and nothing left behind: the old checkpoint still holds what was removed.
muter audit --ckpt_path digits.ckpt --verify
muter refresh --config config.yaml --ckpt_path digits.ckpt
muter purge --ckpt_path digits.ckpt
muter purge --ckpt_path digits.ckpt --yes
muter audit --ckpt_path digits.ckpt --verify

# 6. The result is an ordinary Lightning checkpoint.
muter test --config config.yaml --ckpt_path digits.muter.ckpt
