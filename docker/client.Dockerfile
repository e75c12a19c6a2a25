# The edge client, for x86-64 and arm64. Build it from the project's root:
#   docker build -f docker/client.Dockerfile -t lesft-client .
# Other machines, CPU-only builds and sites without a package index: docs/deployment.md

ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE} AS base
# A base without Python, such as NVIDIA's CUDA images, gets its distribution's.
RUN command -v python3 >/dev/null || { apt-get update \
    && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*; }

FROM base AS dependencies
RUN python3 -m pip --version >/dev/null || { apt-get update \
    && apt-get install -y --no-install-recommends python3-pip; }
RUN python3 -m venv --without-pip /opt/lesft
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# pip takes its settings from these; an empty one counts as not given. It also finds what lies in
# docker/wheels, as a rule nothing, which does not stay in the image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
ENV PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# With no packages beside it, pyproject.toml makes an empty LESFT and brings what that needs: this
# layer outlives changes of the source. Client and server share it.
RUN --mount=type=bind,source=docker/wheels,target=/wheels touch README.md LICENSE \
    && python3 -m pip --python /opt/lesft/bin/python install -c constraints.txt '.[model]'

FROM dependencies AS package
COPY README.md LICENSE ./
COPY lesft lesft
COPY lesft_client lesft_client
# --root keeps apart what is added to the layer above.
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    python3 -m pip --python /opt/lesft/bin/python install -c constraints.txt \
    --root /package --prefix /opt/lesft '.[client]'

FROM base
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/lesft lesft \
    && install -d -o lesft -g lesft -m 700 /var/lib/lesft /enrolment \
    && install -d -o lesft -g lesft /monitoring
COPY --from=dependencies /opt/lesft /opt/lesft
COPY --from=package /package /
# The control API stays inside the container; the cache of front weights and what lesft-client
# enroll leaves are below HOME.
ENV PATH=/opt/lesft/bin:$PATH \
    HOME=/var/lib/lesft \
    PYTHONUNBUFFERED=1 \
    LESFT_CLIENT_STATE=/var/lib/lesft/state \
    LESFT_CLIENT_CONTROL=127.0.0.1:8050
USER 10001:10001
WORKDIR /var/lib/lesft
EXPOSE 8050
HEALTHCHECK --interval=30s --timeout=5s --start-period=1m CMD python -m lesft.healthcheck ${LESFT_CLIENT_CONTROL##*:}
ENTRYPOINT ["lesft-client"]
CMD ["train"]
