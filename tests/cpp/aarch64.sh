#!/bin/sh
# A Python with torch for ARM, to be emulated: tests/cpp/aarch64.sh DIR, then
#     QUORUM_AARCH64=DIR make soak
# Needs Debian 12 or a derivative of it with Python 3.11, the packages g++-aarch64-linux-gnu and
# qemu-user, and arm64 among apt's architectures (dpkg --add-architecture arm64; apt-get update).
# Takes 1.5 GB. torch 2.10 is the newest whose wheel for ARM is of a CPU alone.
set -e
mkdir -p "$1/packages" "$1/wheels" "$1/root" "$1/site"
cd "$1"
packages="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libexpat1 zlib1g
    libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1 libgcc-s1 libstdc++6
    libgomp1"
(cd packages && apt-get download $(printf '%s:arm64 ' $packages))
for package in packages/*.deb; do dpkg -x "$package" root; done
platforms=$(printf -- '--platform manylinux_%s_aarch64 ' 2_28 2_27 2_17)
python3 -m pip download --dest wheels --no-deps --only-binary=:all: $platforms \
    --platform manylinux2014_aarch64 --python-version 311 --implementation cp \
    --abi cp311 --abi abi3 --abi none \
    torch==2.10.0 triton numpy safetensors tokenizers msgspec tyro typeguard \
    docstring_parser tqdm typing_extensions sympy mpmath networkx jinja2 filelock fsspec MarkupSafe
for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" site; done
cat > python <<END
#!/bin/sh
# -0: a child process is started by the name of this file
exec qemu-aarch64 -0 "$PWD/python" -L "$PWD/root" -E PYTHONHOME="$PWD/root/usr" -E PYTHONPATH="$PWD/site" "$PWD/root/usr/bin/python3.11" "\$@"
END
chmod +x python
