# With a C compiler, as the modules that messages pass are compiled.
FROM python:3.12 AS build
WORKDIR /build
COPY . .
RUN python -m venv /opt/socketdock \
 && SOCKETDOCK_COMPILE=1 /opt/socketdock/bin/pip install \
    --no-cache-dir --disable-pip-version-check '.[redis]'

FROM python:3.12-slim
COPY --from=build /opt/socketdock /opt/socketdock
# Inside a container only a wildcard address can be reached from outside. With
# --backend=http, set --externalhostandport to where the backend reaches it.
ENV PATH=/opt/socketdock/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SOCKETDOCK_BINDIP=0.0.0.0
# A number, so that Kubernetes can verify that it is not root.
USER 10001:10001
EXPOSE 8765
STOPSIGNAL SIGTERM
# It asks at the address in the options: those of the environment, of the options
# file, and of the command line of process 1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s \
    CMD ["socketdock", "health", "--pid=1"]
ENTRYPOINT ["socketdock"]
