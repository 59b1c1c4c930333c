# docker build -t cnf .
# docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" cnf train demo    # or another command; runs/ is left in this folder
# Small, without CUDA: --build-arg TORCH_INDEX=URL, the index of CPU builds that pytorch.org/get-started names
# With a GPU: docker run --gpus all ...
FROM python:3.12-slim

ARG TORCH_INDEX=
RUN pip install --no-cache-dir torch torchvision ${TORCH_INDEX:+--index-url $TORCH_INDEX}

COPY setup.cfg pyproject.toml README.md LICENSE /src/
COPY cnf /src/cnf
RUN pip install --no-cache-dir '/src[all]' && rm -rf /src

# a home for the caches of any --user
ENV OMP_WAIT_POLICY=PASSIVE HOME=/tmp
WORKDIR /work
ENTRYPOINT ["cnf"]
CMD ["--help"]
