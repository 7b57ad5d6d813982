# syntax=docker/dockerfile:1
FROM python:3.12-slim
# For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX=""
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home qlora \
    && install --directory --owner=qlora /srv/qlora /srv/data
WORKDIR /srv/qlora
USER qlora
COPY --chown=qlora . .
ENV QLORA_DATA_DIR=/srv/data
RUN make setup PYTHON=python3 TORCH_INDEX="${TORCH_INDEX}"
EXPOSE 8000
ENTRYPOINT [".venv/bin/python", "rag_qlora.py"]
CMD ["serve", "--host", "0.0.0.0"]
