# The service with torch for CPUs, or for CUDA 13 with --build-arg TORCH=cu130: of a GPU the host needs only the driver.
# No weights: /models is the model store, /var/lib/candlecast what the service writes; both and /tmp stay writable.
ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS build
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
ENV PIP_PYTHON=/opt/candlecast/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python3 -m venv --without-pip /opt/candlecast
COPY requirements.lock constraints.txt ./
# That index has this build of torch alone; what torch needs comes from PyPI, under the pins.
RUN grep '^torch==' requirements.lock > torch.txt \
    && pip install --no-deps --index-url "${TORCH_INDEX}" -r torch.txt
COPY . .
# The gpu twin of onnxruntime is a quarter of a gigabyte that a CPU cannot use.
RUN if [ "${TORCH}" = cpu ]; then \
        sed -i -e '/"onnxruntime-gpu/d' -e 's/"\(onnxruntime>=[^;]*\);.*"/"\1"/' pyproject.toml; \
    fi \
    && pip install -c requirements.lock -c constraints.txt '.[hub,otel,s3]'
# Of the packages that ship sample candles only the candles go on.
RUN pip install --no-deps -c requirements.lock --target /samples arch bokeh-sampledata \
    && PYTHONPATH=/samples /opt/candlecast/bin/candlecast sample-data /srv/candlecast/data/samples \
    && cp --parents training/recipes/*.toml /srv/candlecast

FROM ${BASE}
ENV PATH=/opt/candlecast/bin:${PATH} \
    HOME=/tmp \
    CANDLECAST_HOST=0.0.0.0 \
    CANDLECAST_HOME=/var/lib/candlecast \
    CANDLECAST_STORE_ROOT=/models
RUN useradd --no-log-init --uid 10001 --user-group --home-dir /tmp candlecast \
    && install --directory --owner 10001 --group 10001 /models /var/lib/candlecast
COPY --from=build /opt/candlecast /opt/candlecast
COPY --from=build /srv/candlecast /srv/candlecast
WORKDIR /srv/candlecast
USER 10001:10001
VOLUME ["/models", "/var/lib/candlecast"]
EXPOSE 8000 8001
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s CMD ["candlecast", "health"]
ENTRYPOINT ["candlecast"]
CMD ["serve"]
