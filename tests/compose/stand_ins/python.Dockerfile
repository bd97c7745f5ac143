# Python 3.11 of Debian; docker.io's image has a build of its own. Like there: a pip that everything can import, and no
# bytecode. `pip.conf` is this machine's.
FROM nibble-stand-in/debian
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && ln -s /usr/bin/python3 /usr/local/bin/python \
 && python3 -m venv /tmp/pip && cp -r /tmp/pip/lib/python3.11/site-packages/pip /usr/local/lib/python3.11/dist-packages/ \
 && rm -r /tmp/pip && find / -xdev -name __pycache__ -prune -exec rm -r {} +
COPY pip.conf /etc/pip.conf
