# docker build -t cnf .
# docker run --rm -v "$PWD:/work" cnf train demo            # or any other command of cnf; runs/ is left in this folder
# With a GPU: docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t cnf . ; docker run --gpus all ...
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch torchvision --index-url ${TORCH_INDEX}

COPY setup.cfg pyproject.toml README.md LICENSE /src/
COPY cnf /src/cnf
RUN pip install --no-cache-dir '/src[all]' && rm -rf /src

ENV OMP_WAIT_POLICY=PASSIVE
WORKDIR /work
ENTRYPOINT ["cnf"]
CMD ["--help"]
