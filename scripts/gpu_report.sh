#!/usr/bin/env bash
# Measures what needs a GPU, in parts of less than ten minutes each, without a network.
#
#   bash scripts/gpu_report.sh tests OUTPUT              the tests marked gpu
#   bash scripts/gpu_report.sh speed OUTPUT TEXT         training, encoding and decoding, eager and compiled, beside stock
#   bash scripts/gpu_report.sh growth OUTPUT             time and memory against length and batch, beside stock
#   bash scripts/gpu_report.sh pretrain OUTPUT TEXT      some minutes of masked language modeling, with its curve
#   bash scripts/gpu_report.sh images OUTPUT IMAGES      seven vision transformers, three seeds each
#   bash scripts/gpu_report.sh decoder OUTPUT FOLDER     smaller attention in SmolLM2, fitted and healed
#
# OUTPUT is a folder for logs, JSON files, tables and plots, and report.md of all parts so far; a part that is run again
# continues. TEXT is a file of documents (.parquet, .txt or .json). IMAGES is as of train_images.py. FOLDER has smollm2/
# (a GGUF file, or a saved model), wiki.parquet to calibrate and heal on, wiki_validation.parquet and blimp.parquet. The
# packages are those of the environment; without an installation, PYTHONPATH=. will do. TINY=1 takes the smallest sizes,
# to try the script on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?name a part: tests, speed, growth, pretrain, images or decoder} output=${2:?name an output folder}
case $part in
    tests | speed | growth | pretrain | images | decoder) mkdir -p "$output" ;;
    *) echo "no part is named $part: tests, speed, growth, pretrain, images or decoder" >&2 && exit 2 ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
device=cuda precision=bf16
[ -z "${TINY:-}" ] || { device=cpu precision=fp32; }

tests() {
    # Warnings of other releases than the pinned ones are no errors here.
    python -m pytest -m gpu -W ignore -p no:cacheprovider -v tests 2>&1 | tee "$output/tests.txt"
}

tiny_shape="hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,vocab_size=512"

# benchmark NAME COMMAND TINY_OPTIONS OPTIONS…: measures once.
benchmark() {
    local name=$1 command=$2 tiny=$3 options=("${@:4}")
    [ ! -f "$output/$name.json" ] || return 0
    # With tiny shapes nothing is compiled, to save time.
    [[ -z "${TINY:-}" || $name != *_compiled ]] || return 0
    if [ -n "${TINY:-}" ]; then
        # shellcheck disable=SC2206
        options=($tiny --rounds 1 --model_fields "$tiny_shape")
    fi
    python scripts/benchmark.py "$command" --device $device --precision $precision "${options[@]}" \
        --output "$output/$name.json" 2>"$output/$name.err" | tee "$output/$name.txt"
}

speed() {
    local text=${1:?name a file of documents}
    benchmark mlm train "--task mlm --shapes 2x16 --skip_memory" --task mlm --shapes 64x512 --rounds 15
    benchmark clm train "--task clm --shapes 2x16 --skip_memory" --task clm --shapes 16x1024 --rounds 15
    benchmark clm_shared train "--task clm --scheme shared --shapes 2x16 --skip_memory" \
        --task clm --scheme shared --shapes 16x1024 --rounds 15 --skip_memory
    benchmark mlm_compiled train "" \
        --task mlm --shapes 64x512 --rounds 15 --compile --skip_memory
    benchmark clm_compiled train "" \
        --task clm --shapes 16x1024 --rounds 15 --compile --skip_memory
    benchmark packed packed "--train_file $text --documents 100 --vocab_size 512 --shapes 2x64" \
        --train_file "$text" --shapes 64x512 --rounds 15
    benchmark encode encode "--scheme shared --shapes 2x16" --shapes 64x128 1x16 --rounds 15
    benchmark decode decode "--scheme shared --shapes 1x4 --new_tokens 2" \
        --scheme shared --shapes 1x512 8x512 --new_tokens 512 --rounds 3
    benchmark decode_compiled decode "" \
        --scheme shared --shapes 1x512 8x512 --new_tokens 512 --rounds 3 --compile
    local masa=depth_sharing=masa,num_atoms=4,depth_shared_matrices=qkvo,coefficient_source=network
    benchmark masa train "--task mlm --shapes 2x16 --sharing depth_sharing=masa,num_atoms=1 --skip_memory" \
        --task mlm --scheme standard --sharing $masa --shapes 64x512 --rounds 15
    benchmark profile profile "--shapes 2x16 --task mlm" --task mlm --shapes 64x512
}

growth() {
    benchmark growth growth "--lengths 16 --batch_sizes 2 --shapes 1x16"
}

pretrain() {
    local text=${1:?name a file of documents} options=()
    [ -z "${TINY:-}" ] || options=(--max_steps 4 --logging_steps 1 --eval_steps 2 --use_cpu true --bf16 false
        --torch_compile false --block_size 32 --per_device_train_batch_size 2 --tokenizer_vocab_size 512
        --max_train_samples 200 --dataloader_num_workers 0 --config_name configs/models/shared_bert_tiny.yaml)
    python scripts/pretrain.py configs/pretrain/shared_bert_base_minutes.yaml --train_file "$text" \
        --output_dir "$output/pretrain" "${options[@]}" 2>"$output/pretrain.err" | tee "$output/pretrain.txt"
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
{
    echo "# GPU report"
    for file in "$output"/*.txt "$output"/scores.md "$output"/rows/results.md; do
        [ ! -f "$file" ] || printf '\n## %s\n\n```\n%s\n```\n' "$(basename "$file")" "$(cat "$file")"
    done
} >"$output/report.md"
