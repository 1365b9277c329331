#!/bin/sh
# Everything about a GPU in under 9 minutes: the tests that need one, then every measurement, into one JSON.
#
#   benchmarks/gpu.sh [--set FOLDER] [--out FILE]     on a machine with a GPU
#   benchmarks/gpu.sh --smoke                         the same in small, on a CPU: does all of it run?
#   benchmarks/gpu.sh --schedule 32 --set FOLDER      only the whole schedule, 50 + 30 epochs, in batches of 32
#
# FOLDER is a packed set, made anywhere by `python -m benchmarks.shard_sets FOLDER`. PYTHON names the interpreter
# (default: .venv/bin/python where there is one, else python3); of packages it needs torch, torchvision, jaxtyping,
# scikit-learn (with threadpoolctl), safetensors, psutil, pillow and pyarrow, for the tests pytest as well. Ray, MLflow and S3 are not needed.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
case " $* " in
*" --smoke "* | *" --schedule "*) ;;
*)
    # Without conftest.py and pyproject.toml, which need packages that a bare GPU host does not have.
    timeout 120 "$PYTHON" -m pytest -q -c /dev/null --rootdir . --noconftest --import-mode=importlib -m needs_gpu \
        tests/tavlad/test_gpu.py tests/shards/test_gpu_decode.py || echo "GPU tests failed" >&2
    ;;
esac
exec "$PYTHON" benchmarks/gpu.py "$@"
