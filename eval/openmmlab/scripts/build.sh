#!/usr/bin/env bash
# Builds a Python environment with mmpose, mmdet and mmcv's compiled CPU operators: build.sh FOLDER [PYTHON]
#
# OpenMMLab's packages want an environment of their own: mmpretrain does not import beside transformers 5, mmcv has no wheels for
# current torch versions, and mmpose's dependency chumpy no longer installs (nothing that ViTPose needs uses it).
# Takes about 25 minutes on 2 cores, nearly all of it in mmcv's compiler. MAX_JOBS bounds the compiler processes.
# A step that is done is not done again, so a broken build goes on where it stopped.
set -euo pipefail

folder=${1:?usage: build.sh FOLDER [PYTHON]}
python=${2:-python3.11}

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "mmcv 2.1.0 is built and tested here with Python 3.11; name one: build.sh $folder /path/to/python3.11" >&2
    exit 1
}
command -v c++ >/dev/null || { echo "Need a C++ compiler (Debian: g++)." >&2; exit 1; }

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
install() { "$folder/bin/python" -m pip --disable-pip-version-check install -q "$@"; }
has() { "$folder/bin/python" -m pip show -q "$1" 2>/dev/null; }

# mmcv's and xtcocotools' setup.py import pkg_resources, torch, numpy and Cython: hence no build isolation.
install 'setuptools<81' wheel cython ninja packaging
install torch==2.12.1 torchvision==0.27.1
# What the packages below import, except what only their unused parts do.
install numpy opencv-python-headless pillow pyyaml scipy matplotlib pyarrow addict rich termcolor yapf json_tricks \
    munkres pycocotools shapely terminaltables tqdm six einops importlib-metadata mat4py modelindex
has mmengine || install --no-deps mmengine==0.10.7
has xtcocotools || install --no-deps --no-binary xtcocotools --no-build-isolation xtcocotools==1.14.3
# FORCE_CUDA=0 and no visible GPU: the CPU operators only, also where there is a CUDA compiler.
has mmcv || MMCV_WITH_OPS=1 FORCE_CUDA=0 CUDA_VISIBLE_DEVICES= install --no-deps --no-binary mmcv --no-build-isolation mmcv==2.1.0
install --no-deps mmdet==3.3.0 mmpretrain==1.2.0 mmpose==1.3.2
"$folder/bin/python" -c 'import mmcv.ops, mmdet, mmpose.apis, mmpose.models'
