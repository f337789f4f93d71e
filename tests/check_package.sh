#!/usr/bin/env bash
# Builds the source distribution and, from it, the wheel; twine checks both; the wheel is installed into a fresh environment
# and asked for noise, files and its command there. PYTHON (of an environment with the dependencies, build and twine) lends
# that environment its libraries, not its tfb_ext. The CUDA sources are compiled by compile_cuda.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:?check_package: got no argument, expected PYTHON. Fix: bash tests/check_package.sh .venv/bin/python}")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
case $python in /*) ;; *) python=$PWD/$python ;; esac

# From a copy of what git tracks or would track, so that no list of files of an earlier build counts.
mkdir "$out/tree"
git ls-files -z --cached --others --exclude-standard | tar --null -cf - -T - | tar -xf - -C "$out/tree"
TFB_EXT_BUILD=cpu "$python" -m build --no-isolation --outdir "$out/dist" "$out/tree"
"$python" -m twine check --strict "$out"/dist/*

tar -tzf "$out"/dist/*.tar.gz | sed -n 's|^[^/]*/\(csrc/.*[^/]\)$|\1|p' | LC_ALL=C sort >"$out/packed"
(cd "$out/tree" && find csrc -type f | LC_ALL=C sort) >"$out/sources"
diff "$out/sources" "$out/packed" || { echo "check_package: the source distribution lacks files of csrc"; exit 1; }

"$python" -m venv "$out/fresh"
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$libraries" >"$("$out/fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
"$out/fresh/bin/python" -m pip install --quiet --no-index --no-deps "$out"/dist/*.whl
cd "$out"
fresh/bin/python - "$out/fresh" <<'PYTHON'
import sys
from importlib.resources import files
from pathlib import Path

import tfb_ext
from tfb_ext import ops
from tfb_ext.ops import reference

folder = files(tfb_ext)
assert Path(str(folder)).is_relative_to(Path(sys.argv[1]).resolve()), folder
assert (ops.noise(5, 70, 1, 2, 3).double() - reference.noise_float64(5, 70, 1, 2, 3)).abs().max() <= 1e-5
app = ("templates/report.html", "templates/generation.html", "demo/adapter/adapter_model.safetensors")
for part in ("py.typed", *(f"app/{name}" for name in app)):
    assert (folder / part).is_file(), part
for name in tfb_ext.__all__:
    getattr(tfb_ext, name)
PYTHON
fresh/bin/tfb --help >/dev/null
echo "check_package: the wheel of the source distribution installs and runs"
