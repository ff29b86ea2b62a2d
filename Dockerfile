# trl-bridge on NVIDIA GPUs. Not built and not run by the maintainers: docs/gpu_quickstart.md says what was.
#
#   docker build --tag trl-bridge .
#   docker run --rm --gpus all --shm-size 16g --volume "$PWD:/work" trl-bridge selftest
#
# PyTorch's wheel brings CUDA's libraries; the machine brings the driver and NVIDIA's container toolkit. `python:3.12` has the compiler
# that Triton and DeepSpeed ask for when they run.
FROM python:3.12-bookworm

COPY . /opt/trl-bridge
ARG EXTRAS=demo,deepspeed
RUN pip install --no-cache-dir -c /opt/trl-bridge/constraints.txt torch==2.13.0 \
    && pip install --no-cache-dir -c /opt/trl-bridge/constraints.txt "/opt/trl-bridge[${EXTRAS}]"

# `code_reward` runs what a model wrote: not as root.
RUN useradd --create-home trainer && mkdir /work && chown trainer /work
USER trainer
WORKDIR /work
ENTRYPOINT ["trl-bridge"]
CMD ["--help"]
