# A server of trained runs, on the CPU: docs/DEPLOYING.md.
#
#   docker build -t nanods .
#   docker run -p 8000:8000 -e NANODS_TOKEN=secret -v ./runs:/app/runs:ro nanods v2-tiny

FROM python:3.12-slim

# constraints.txt fixes the versions; PyTorch's own index has them without CUDA.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY nanods nanods
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
      -c constraints.txt '.[serve]' \
    && useradd --create-home --uid 1000 nanods

# In the container the port is always 8000, which the health check asks: choose the one outside by
# -p 9000:8000, not by --port.
USER 1000
WORKDIR /app
EXPOSE 8000 50051
HEALTHCHECK --start-period=60s \
  CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/healthz', timeout=5)"]

# Other machines reach it, so it does not start without the environment variable NANODS_TOKEN.
ENTRYPOINT ["python", "-u", "-m", "nanods.serving", "--host", "0.0.0.0"]
CMD ["v2-tiny"]
