FROM python:3.13-slim

# The total that serving processes share is one atomic addition of this library.
RUN apt-get update && apt-get install -y --no-install-recommends libatomic1 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY server.py client.py protocol.py ./
COPY counter ./counter
RUN python -m compileall -q .

# Where a total can be kept: a volume that is mounted here is the user's, as this directory is.
RUN install -d -o 10001 -g 10001 /data

USER 10001:10001
ENV COUNTER_SERVER_HOST=0.0.0.0 COUNTER_SERVER_ADMIN_PORT=8580
EXPOSE 8080 8580
STOPSIGNAL SIGTERM

# The admin port is answered while every worker is taken. Another one has to come by the environment,
# not by a flag, for this to know it. For a client: --no-healthcheck.
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/livez' % os.environ['COUNTER_SERVER_ADMIN_PORT'], timeout=9)"]

CMD ["python", "server.py"]
