#!/usr/bin/env bash
# Measures what needs a GPU, in parts of less than ten minutes each, without a network.
#
#   bash scripts/gpu_report.sh tests OUTPUT              the tests marked gpu
#   bash scripts/gpu_report.sh speed OUTPUT              training steps and decoding, eager and compiled, beside stock
#   bash scripts/gpu_report.sh images OUTPUT IMAGES      seven vision transformers, three seeds each
#   bash scripts/gpu_report.sh decoder OUTPUT FOLDER     smaller attention in SmolLM2, fitted and healed
#
# OUTPUT is a folder for logs, JSON files, tables and plots; a part that is run again continues. IMAGES is as of
# train_images.py. FOLDER has smollm2/ (a GGUF file, or a saved model), wiki.parquet to calibrate and heal on,
# wiki_validation.parquet and blimp.parquet. The packages are those of the environment; without an installation,
# PYTHONPATH=. will do. TINY=1 takes the smallest sizes, to try the script on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?name a part: tests, speed, images or decoder} output=${2:?name an output folder}
mkdir -p "$output"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
device=cuda precision=bf16
[ -z "${TINY:-}" ] || { device=cpu precision=fp32; }

tests() {
    # Warnings of other releases than the pinned ones are no errors here.
    python -m pytest -m gpu -W ignore -p no:cacheprovider -v tests 2>&1 | tee "$output/tests.log"
}

benchmark() {
    local name=$1
    shift
    [ -f "$output/$name.json" ] || python scripts/benchmark.py "$@" --device $device --output "$output/$name.json"
}

speed() {
    local mlm=64x512 clm=16x1024 shape="" rounds=15
    if [ -n "${TINY:-}" ]; then
        mlm=2x16 clm=2x16 rounds=1
        shape="hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,vocab_size=64"
    fi
    for compile in "" --compile; do
        benchmark "mlm${compile:+_compiled}" train --task mlm --shapes $mlm --precision $precision --rounds $rounds --model_fields "$shape" $compile
        benchmark "clm${compile:+_compiled}" train --task clm --shapes $clm --precision $precision --rounds $rounds --model_fields "$shape" $compile
    done
    local of_decoding=()
    [ -z "$shape" ] || of_decoding=(--model_fields "$shape" --new_tokens 2 --shapes 1x4 --sharing "depth_sharing=masa,num_atoms=1")
    benchmark depth depth --shapes $mlm --precision $precision --rounds $rounds --model_fields "$shape" \
        ${shape:+--sharing "depth_sharing=masa,num_atoms=1"}
    benchmark decode decode --rounds $rounds "${of_decoding[@]}"
}

images() {
    local images=${1:?name a folder of images} options=() names=() pids=()
    [ -z "${TINY:-}" ] || options=(--max_train_samples 64 --max_eval_samples 64 --num_train_epochs 1 --use_cpu true)
    train() {
        names+=("$output/$1")
        python scripts/train_images.py configs/images/vit_tiny.yaml --images "$images" --seeds 0,1,2 \
            --output_dir "$output/$1" "${options[@]}" "${@:2}" >"$output/$1.log" 2>&1 &
        pids+=($!)
    }
    train standard
    train masa_qkv --depth_sharing masa --num_atoms 2
    train masa_qkvo --depth_sharing masa --num_atoms 2 --depth_shared_matrices qkvo
    train sequential --depth_sharing sequential --num_groups 2 --depth_shared_matrices qkvo
    train repeat_all_over --depth_sharing repeat_all_over --num_groups 2 --depth_shared_matrices qkvo
    train narrow --config_overrides hidden_size=56,intermediate_size=224
    train low_rank --depth_sharing low_rank --rank 11 --depth_shared_matrices qkvo
    for pid in "${pids[@]}"; do wait "$pid"; done
    python scripts/evaluate.py scores --model "$(IFS=,; echo "${names[*]}")" --output "$output/scores.json"
}

decoder() {
    local folder=${1:?name the folder of smollm2} options=(--pairs 100) pids=()
    [ -z "${TINY:-}" ] || options=(--pairs 1 --saved 0.2 --texts 2 --heal_steps 1 --calibration_tokens 1024)
    for row in low_rank "masa, 1 atom, + rank" "masa, 3 atoms in 3 groups, + rank" "masa, 3 groups" sequential masa; do
        python scripts/convert_smollm2.py --model "$folder/smollm2" --text "$folder/wiki.parquet" \
            --held_out "$folder/wiki_validation.parquet" --blimp "$folder/blimp.parquet" \
            --rows "$row" --output_dir "$output/rows" "${options[@]}" >"$output/${row// /_}.log" 2>&1 &
        pids+=($!)
        [ -z "${TINY:-}" ] || break
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
    cat "$output/rows/results.md"
}

"$part" "${@:3}"
