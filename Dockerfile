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
# By TLS where the environment says so; whose certificate it is does not matter.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "import os, ssl, urllib.request; get = os.environ.get; urllib.request.urlopen('http' + 's' * bool(get('SOCKETDOCK_TLS_CERT')) + '://127.0.0.1:' + get('SOCKETDOCK_BINDPORT', '8765') + '/livez', timeout=2, context=ssl._create_unverified_context())"]
ENTRYPOINT ["socketdock"]
