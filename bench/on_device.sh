#!/usr/bin/env bash
# The GPU tests and benchmarks on a machine that cannot install anything: from a copy of the repository, with a Python
# that has torch, onnx, onnx_ir, onnxscript, timm, transformers, cuda-core, pytest and nvcc, and wheels that were carried.
#
#   bench/on_device.sh collect DIR          keep what lies in .whl/ (wheels, parts of a split wheel) in DIR
#   bench/on_device.sh test DIR [ARGS...]   install from DIR, build the CUDA kernels, run `pytest -m gpu`
#   bench/on_device.sh bench DIR [ARGS...]  the same, then bench/gpu.py and bench/cuda_kernels.py
#
# What to carry, made on a machine with a registry (onnxruntime-gpu is larger than one transfer: a part to each call):
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl msgspec rich typer onnxruntime-gpu ...
#   cd .whl && split -b 48M onnxruntime_gpu-*.whl onnxruntime_gpu.part. && rm onnxruntime_gpu-*.whl
# Results are left in bench/results and, where $OUT is a folder, copied there.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
action=$1
store=$2
shift 2

if [ "$action" = collect ]; then
    mkdir -p "$store"
    cp -v .whl/* "$store"/
    exit 0
fi

site=$store/site
if [ ! -d "$site" ]; then
    parts=("$store"/onnxruntime_gpu.part.*)
    if [ -e "${parts[0]}" ]; then
        version=${ORT_GPU_VERSION:-1.31.1}
        cat "${parts[@]}" >"$store/onnxruntime_gpu-$version-cp312-cp312-manylinux_2_28_x86_64.whl"
    fi
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$store"/*.whl
fi

# The package as a wheel would lay it out: export/ and runtimes/ below attn_deploy/.
package=$store/package/attn_deploy
mkdir -p "$package"
ln -sfn "$root"/attn_deploy/* "$package"/
ln -sfn "$root"/export "$package"/export
ln -sfn "$root"/runtimes "$package"/runtimes
export PYTHONPATH=$store/package:$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XDG_CACHE_HOME=$store/cache

nvidia-smi
python3 -m attn_deploy.cli doctor || true
python3 -m attn_deploy.runtimes.native.cuda.build || true
status=0
case $action in
    test) python3 -m pytest -m gpu -rs "$@" || status=$? ;;
    bench)
        python3 bench/gpu.py "$@" || status=$?
        python3 bench/cuda_kernels.py || status=$?
        ;;
    *) echo "unknown action $action: collect, test or bench" >&2; exit 2 ;;
esac
if [ -n "${OUT:-}" ] && [ -d "${OUT:-}" ]; then
    cp -r bench/results "$OUT"/
fi
exit $status
