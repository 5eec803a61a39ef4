#!/usr/bin/env bash
# The comparisons of docs/study.md, one a call, into comparisons/study/NAME; a stopped one goes on.
#   bash docs/study/run.sh rates|forms|search|parts|field|confirm|unbalanced [options of compare]
#   bash docs/study/run.sh single [options of tests/benchmarks/single_tasks.py]
# MTL_LORA_DATA names the folder of the data, see docs/real-data.md.
set -euo pipefail

rate=training.learning_rate
up=training.parts.up.learning_rate
Lambda=training.parts.transform.learning_rate
lora=lora
diagonal=mtl-lora,adapter.up_projections=1,adapter.transform=diagonal

# What both recipes said before the study; real-17 says now what won.
before=(
  adapter.rank=8 adapter.alpha=16 adapter.up_projections=3 adapter.transform=full
  adapter.transform_start=0 "$rate=2e-3" "training.parts={}"
)

compare() { # stage, recipe, options
  local stage=$1 recipe=$2
  shift 2
  mtl-lora compare "$recipe" "${before[@]}" "$@" --output "comparisons/study/$stage"
}
tuned=(
  --methods lora-tuned,mtl-tuned --baseline lora-tuned
  --variant "lora-tuned=$lora,$rate=1e-3,$up=4e-3"
  --variant "mtl-tuned=$diagonal,$rate=1e-3,$up=4e-3,$Lambda=0.01,adapter.transform_start=0.5"
)

stage=${1:?which of rates, forms, search, parts, field, single, confirm, unbalanced}
shift
case $stage in
rates) # ranks 17, 5.17 million values
  compare rates real-17 --seeds 1 --score validation --methods lora,diagonal \
    --variant "diagonal=$diagonal" --sweep "$rate=1e-3,2e-3,4e-3" "$@"
  ;;
forms) # the same size; everything at one rate
  compare forms real-17 --seeds 1 --score validation --baseline d_fast \
    --methods d_fast,l_scale4,d_start,l_drop,d_both \
    --variant "d_fast=$diagonal,$Lambda=0.02" \
    --variant "d_start=$diagonal,adapter.transform_start=1" \
    --variant "d_both=$diagonal,adapter.transform_start=0.5,$Lambda=0.01" \
    --variant "l_scale4=$lora,adapter.alpha=32" \
    --variant "l_drop=$lora,adapter.dropout=0.05" "$@"
  ;;
search) # from here on rank 16, 4.9 million values
  compare search real-17 --seeds 1 --score validation --match params:4945170 --baseline l20 \
    --methods l20,d20,l14,d14,l28,d28,l10up4,d20x30,l14ep5,d14ep5,l14warm,d14x30 \
    --variant "l20=$lora,$rate=2e-3" \
    --variant "l14=$lora,$rate=1.4e-3" \
    --variant "l28=$lora,$rate=2.8e-3" \
    --variant "l10up4=$lora,$rate=1e-3,$up=4e-3" \
    --variant "l14ep5=$lora,$rate=1.4e-3,training.epochs=5" \
    --variant "l14warm=$lora,$rate=1.4e-3,training.warmup=0.2" \
    --variant "d20=$diagonal,$rate=2e-3,$Lambda=0.02" \
    --variant "d14=$diagonal,$rate=1.4e-3,$Lambda=0.014" \
    --variant "d28=$diagonal,$rate=2.8e-3,$Lambda=0.028" \
    --variant "d20x30=$diagonal,$rate=2e-3,$Lambda=0.06" \
    --variant "d14ep5=$diagonal,$rate=1.4e-3,$Lambda=0.014,training.epochs=5" \
    --variant "d14x30=$diagonal,$rate=1.4e-3,$Lambda=0.042" "$@"
  ;;
parts) # what B's own rate does
  compare parts real-17 --seeds 1 --score validation --match params:4945170 --baseline l10up8 \
    --methods l10up8,d10up4,l14up4,d14up4,l10up16,d10up4s,l07up8 \
    --variant "l10up8=$lora,$rate=1e-3,$up=8e-3" \
    --variant "l14up4=$lora,$rate=1.4e-3,$up=5.6e-3" \
    --variant "l10up16=$lora,$rate=1e-3,$up=16e-3" \
    --variant "l07up8=$lora,$rate=0.7e-3,$up=5.6e-3" \
    --variant "d10up4=$diagonal,$rate=1e-3,$up=4e-3,$Lambda=0.01" \
    --variant "d14up4=$diagonal,$rate=1.4e-3,$up=5.6e-3,$Lambda=0.014" \
    --variant "d10up4s=$diagonal,$rate=1e-3,$up=4e-3,$Lambda=0.01,adapter.transform_start=0.5" "$@"
  ;;
field) # the rest of the family, at settings that LoRA had, too
  names=() variants=()
  try() { # name=method,its own settings; name=rates …
    local own=$1 rates
    shift
    for rates in "$@"; do
      names+=("${own%%=*}_${rates%%=*}")
      variants+=(--variant "${names[-1]}=${own#*=},${rates#*=}")
    done
  }
  four=("10=$rate=1e-3" "20=$rate=2e-3" "40=$rate=4e-3" "10up4=$rate=1e-3,$up=4e-3")
  try "weights=mtl-lora,adapter.rank_pattern={down_proj: 6}" "${four[@]}" "07up8=$rate=0.7e-3,$up=5.6e-3"
  try "embedding=mtl-lora,adapter.gate=embedding,adapter.rank_pattern={down_proj: 6}" "${four[@]}"
  try "mtlora=mtlora,adapter.task_modules=[o_proj]" "${four[@]}"
  try "moelora=moelora,adapter.up_projections=16" "${four[@]}"
  try "multilora=multilora,adapter.up_projections=2,adapter.rank_pattern={down_proj: 6}" "${four[@]}"
  compare field real-17 --seeds 1 --score validation --match params:4945170 --baseline weights_10 \
    --methods "$(IFS=,; echo "${names[*]}")" "${variants[@]}" "$@"
  ;;
single) # LoRA of rank 16 for each task alone: as many epochs, four times the steps
  python "$(dirname "$0")/../../tests/benchmarks/single_tasks.py" real-17 comparisons/study/single \
    "${before[@]}" training.rows_per_step=1 --match params:4884480 --seeds 1, \
    --sweep "$rate=5e-4,1e-3,2e-3" "$@"
  ;;
confirm) # test files, seeds that no search saw
  compare confirm real-17 --match params:4945170 --seeds 1,2,3,4,5,6,7,8,9,10 "${tuned[@]}" "$@"
  ;;
unbalanced) # another mixture
  compare unbalanced unbalanced-3 training.epochs=3 training.rows_per_step=4 training.clipping=null --match params:4895190 --seeds 1,2,3,4,5 "${tuned[@]}" "$@"
  ;;
*)
  echo "no stage is called '$stage'" >&2
  exit 2
  ;;
esac
