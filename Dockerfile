FROM python:3.12-slim AS build
WORKDIR /build
COPY . .
RUN python -m venv /opt/socketdock \
 && /opt/socketdock/bin/pip install --no-cache-dir --disable-pip-version-check .

FROM python:3.12-slim
COPY --from=build /opt/socketdock /opt/socketdock
# Inside a container only a wildcard address can be reached from outside. With
# --backend=http, say by --externalhostandport where the backend reaches it.
ENV PATH=/opt/socketdock/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SOCKETDOCK_BINDIP=0.0.0.0
# A number, so that Kubernetes can tell that it is not root.
USER 10001:10001
EXPOSE 8765
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('SOCKETDOCK_BINDPORT', '8765') + '/livez', timeout=2)"]
ENTRYPOINT ["socketdock"]
