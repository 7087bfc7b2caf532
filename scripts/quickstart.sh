#!/usr/bin/env bash
# From nothing to two small models that have read the documentation on this machine: no download but packages.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh train

runs=runs/quickstart
for model in shared_bert shared_gpt; do
    output=$runs/$model
    echo
    if [ -f "$output/loss_curve.png" ]; then
        echo "== $output holds a trained model: it is reused (delete the folder to train again)"
        continue
    fi
    start=(--overwrite_output_dir)
    if compgen -G "$output/checkpoint-*" >/dev/null; then
        start=(--resume_from_checkpoint true)
    fi
    echo "== Pre-training configs/pretrain/${model}_tiny.yaml on python-docs; results go to $output"
    python scripts/pretrain.py "configs/pretrain/${model}_tiny.yaml" --output_dir "$output" "${start[@]}"
done

echo
echo "== Loading both models back with the Auto classes (after minutes of training: common words, not sense)"
python scripts/try_model.py "$runs/shared_bert" \
    "Return the [MASK] of the array along the given axis." "The first [MASK] of the function is a string."
python scripts/try_model.py "$runs/shared_gpt" "Return the" "Parameters"

echo
echo "== Done. Loss curves with the unigram entropy of the corpus: $runs/*/loss_curve.png (numbers: loss_curve.json)"
echo "== Next: source .venv/bin/activate, and pre-train on your own text as the README shows"
