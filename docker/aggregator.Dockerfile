# The aggregation server: no torch, no transformers. Build it from the project's root:
#   docker build -f docker/aggregator.Dockerfile -t lesft-aggregator .
# Sites without a package index: docs/deployment.md

ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE} AS dependencies
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
# layer outlives changes of the source.
RUN --mount=type=bind,source=docker/wheels,target=/wheels touch README.md LICENSE \
    && python3 -m pip --python /opt/lesft/bin/python install -c constraints.txt '.[aggregator]' \
    && find /opt/lesft -path '*/numpy/*' -type d -name tests -prune -exec rm -r {} +

FROM dependencies AS package
COPY README.md LICENSE ./
COPY lesft lesft
COPY lesft_aggregator lesft_aggregator
# --root keeps apart what is added to the layer above.
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    python3 -m pip --python /opt/lesft/bin/python install -c constraints.txt \
    --root /package --prefix /opt/lesft '.[aggregator]'

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/lesft lesft \
    && install -d -o lesft -g lesft -m 700 /var/lib/lesft /enrolment \
    && install -d -o lesft -g lesft /monitoring
COPY --from=dependencies /opt/lesft /opt/lesft
COPY --from=package /package /
# Beyond the container it encrypts, and lets in those only who enrolled.
ENV PATH=/opt/lesft/bin:$PATH \
    HOME=/var/lib/lesft \
    PYTHONUNBUFFERED=1 \
    LESFT_AGGREGATOR_STATE=/var/lib/lesft/state \
    LESFT_AGGREGATOR_LISTEN=0.0.0.0:50052 \
    LESFT_AGGREGATOR_CONTROL=0.0.0.0:8052
USER 10001:10001
WORKDIR /var/lib/lesft
EXPOSE 50052 8052
HEALTHCHECK --interval=10s --timeout=5s --start-period=1m CMD python -m lesft.healthcheck ${LESFT_AGGREGATOR_CONTROL##*:}
ENTRYPOINT ["lesft-aggregator"]
