# esegeta_monai from this checkout, with the CPU build of torch. For a machine without internet see docs/hospital.md.
#
#   docker build -t esegeta-monai .
#   docker run --rm -v "$PWD/demo_output:/work" --user "$(id -u):$(id -g)" esegeta-monai demo --output /work
#
# For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128, and `--gpus all` with `docker run`.
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The user is not known here and has no account in the image: nothing is written but below /tmp, and MONAI, which asks
# for the user's name when it is imported, is told one.
ENV OMP_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=esegeta MPLCONFIGDIR=/opt/matplotlib

COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt --index-url "$TORCH_INDEX" \
    --extra-index-url https://pypi.org/simple "torch==2.13.0"
COPY . /source
RUN pip install --no-cache-dir -c /tmp/constraints.txt "/source[demo,itk]" \
    && rm -r /source \
    && python -c "import matplotlib.font_manager" \
    && chmod -R a+rwX /opt/matplotlib

WORKDIR /tmp
ENTRYPOINT ["python", "-m", "esegeta_monai"]
CMD ["--help"]
