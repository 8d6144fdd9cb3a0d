#!/usr/bin/env bash
# The peers' packages as one archive of some 20 MB, for a GPU machine without a network (Python 3.12, x86-64):
#
#     bash benchmarks/peers/pack.sh peers.tar.xz               # where there is a network
#     mkdir /tmp/peers && tar xf peers.tar.xz -C /tmp/peers    # on the machine
#     PYTHONPATH=/tmp/peers:src python benchmarks/gpu_step.py …
#
# Left out: bitsandbytes' libraries for other CUDAs than 13.0, and of CUDA 12 all but the runtime, in cuda12/.
set -euo pipefail
out=$(realpath "${1:?the archive to write}") here=$(cd "$(dirname "$0")" && pwd) site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
platforms=({manylinux_2_28,manylinux_2_24,manylinux_2_17,manylinux2014,manylinux1}_x86_64)
python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --implementation cp --python-version 3.12 \
  "${platforms[@]/#/--platform=}" --target "$site" --requirement "$here/packages.txt"
mkdir "$site/cuda12"
mv "$site"/nvidia/cuda_runtime/lib/libcudart.so.12 "$site/cuda12/"
rm -rf "$site"/{nvidia,bin,studio} "$site"/nvidia_cuda_runtime*
find "$site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*cuda130.so' ! -name '*cpu.so' -delete
tar cJf "$out" -C "$site" --exclude=__pycache__ .
ls -lh "$out"
