# The service, on CPU or CUDA: see deploy/README.md. Both stages need the same base, with Python 3.11 or newer as python3.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
# Where the CPU build of torch comes from. Empty takes pip's own index, whose build is the CUDA one unless pip is
# configured otherwise.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE= PATH=/opt/latentwire/bin:$PATH
RUN python3 -m venv /opt/latentwire
WORKDIR /src
# Dependencies before the code: a change of code does not download torch again.
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; \
        print(*(d for d in p['dependencies'] + e['eval'] + e['train'] + e['serve'] + e['otel'] if 'latentwire' not in d), sep='\n')" \
        > requirements.txt \
    && pip install --no-compile -c constraints.txt -r requirements.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"}
COPY README.md LICENSE ./
COPY latentwire latentwire
COPY bridge bridge
COPY training training
COPY service service
# That of the image; without it, what pyproject.toml falls back to: there is no git here to ask.
ARG VERSION=
RUN SETUPTOOLS_SCM_PRETEND_VERSION=$VERSION pip install --no-compile --no-deps . && pip check
# What only serves to compile against these packages, to test them, to install more, or to speak Arrow's own protocol.
RUN site=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
    && rm -rf "$site"/torch/include "$site"/torch/test "$site"/torch/bin/test_* "$site"/torch/bin/*Test "$site"/torch/bin/protoc* \
        "$site"/pyarrow/include "$site"/pyarrow/*flight* \
    && for package in matplotlib networkx numpy pandas pyarrow scipy sklearn sympy; do \
        find "$site/$package" -type d -name tests -prune -exec rm -rf {} +; done \
    && pip uninstall --quiet --yes pip
# Bytecode of what runs here, since users of the image can write none, and of nothing else, which would be 200 MB more.
# It also shows that nothing needed is gone. Whole seconds, since layers round the times of files, and bytecode older or
# newer than its source is not used.
RUN find /opt/latentwire -name '*.py' -exec touch --date=2026-01-01 {} + \
    && latentwire evaluate builtin --task world --limit 5 \
    && python -Pc "import latentwire.service.app, latentwire.service.health, latentwire.service.processes.answering, \
        latentwire.training.loop, datasets, opentelemetry.exporter.otlp.proto.http.trace_exporter, pyarrow.parquet, sklearn.linear_model"

FROM ${PYTHON_IMAGE}
# A number, so that Kubernetes can see that it is not root. Clusters that give every pod a user of its own give it group 0.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp latentwire \
    && install -d -o 10001 -g 0 -m 775 /models /home/latentwire
COPY --from=build /opt/latentwire /opt/latentwire
# Caches that are no models go below HOME: the one folder that is there to be written by anyone, read-only root or not.
ENV PATH=/opt/latentwire/bin:$PATH HF_HOME=/models HOME=/tmp PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/latentwire
VOLUME /models
EXPOSE 8000
# Wherever the service listens. -P: whatever lies in the working folder is not imported.
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s CMD ["python", "-Pm", "latentwire.service.health"]
ENTRYPOINT ["latentwire"]
CMD ["serve", "--host", "0.0.0.0"]
