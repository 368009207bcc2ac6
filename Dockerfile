FROM python:3.13-slim

# The total that serving processes share is one atomic addition of this library.
RUN apt-get update && apt-get install -y --no-install-recommends libatomic1 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY server.py client.py protocol.py ./
COPY counter ./counter
RUN python -m compileall -q .

USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
CMD ["python", "server.py", "--host", "0.0.0.0"]
