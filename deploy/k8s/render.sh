#!/usr/bin/env bash
# Write what of the manifests comes from the chart, with its own values: `make manifests`. Needs helm.
#   deploy/k8s/render.sh [DIR]
set -euo pipefail
cd "$(dirname "$0")/../helm"
to=$(realpath "${1:-../k8s}") scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
render() { helm template latentwire latentwire --namespace latentwire --output-dir "$scratch/$1" "${@:2}" >/dev/null; }
render one
render several --values replicas.yaml
one="$scratch/one/latentwire/templates" several="$scratch/several/latentwire/templates"
mkdir -p "$to"/{base,components/{replicas/redis,monitoring,autoscaling}}
cp "$one"/*.yaml "$to/base"
cp "$several"/redis/*.yaml "$to/components/replicas/redis"
cp "$several/networkpolicy.yaml" "$to/components/replicas"
cp "$several"/{servicemonitor,prometheusrule}.yaml "$to/components/monitoring"
cp "$several/scaledobject.yaml" "$to/components/autoscaling"
