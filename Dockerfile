# What needs a compiler is made here; it goes on to where none is, at the same path.
FROM python:3.13-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv --without-pip /opt/venv
WORKDIR /app
COPY requirements.txt .
COPY counter/turn/*.[ch] counter/turn/pyproject.toml counter/turn/setup.py counter/turn/source_hash.py counter/turn/
RUN pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check -r requirements.txt

FROM python:3.13-slim

# The total that serving processes share is one atomic addition of this library.
RUN apt-get update && apt-get install -y --no-install-recommends libatomic1 && rm -rf /var/lib/apt/lists/*

COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /app
COPY server.py client*.py protocol.py ./
COPY counter ./counter
RUN python -m compileall -q .
# An image without the compiled engine is none that anybody asked for.
RUN python -m counter.turn.library

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
