#!/bin/sh
# The quickstart, step by step; every line that it shows behind a $ can be typed by hand. BIN is the
# folder of `mtl-lora`; arguments are changes to the recipe.
set -eu
mtl() {
    printf '$ mtl-lora %s\n' "$*" >&2
    "${BIN:+$BIN/}mtl-lora" "$@"
}
step() { printf '\n== %s\n' "$*" >&2; }

step "1 of 4: training three tasks at once on SmolLM2-135M (about five minutes)"
run=$(mtl train quickstart "$@")
echo "$run" >&2
step "2 of 4: how good was the base model before?"
mtl eval --run "$run" --task all --base-only
step "3 of 4: how good is it now?"
mtl eval --run "$run" --task all
step "4 of 4: one task as an ordinary model"
merged=merged/$(basename "$run")/search_ads
mtl merge --run "$run" --task search_ads --output "$merged"

cat >&2 <<EOF

Done. The run is in $run, the merged model in $merged.
Try next:
  ${BIN:+$BIN/}mtl-lora eval --task animals --json        one task's result for a script
  ${BIN:+$BIN/}mtl-lora tasks                             the tasks that come with templates
  ${BIN:+$BIN/}mtl-lora data show quickstart --count 1    what the model reads, token by token
  ${BIN:+$BIN/}mtl-lora train quickstart adapter.gate=embedding training.seed=1
The quickstart's data are small samples written for this project, not a benchmark;
docs/real-data.md goes on with real ones.
EOF
