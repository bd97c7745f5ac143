FROM nibble-stand-in/debian
RUN apt-get update \
 && apt-get install -y --no-install-recommends redis-server \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && mkdir -p /data && chown redis:redis /data
WORKDIR /data
USER redis
# As the real one: the configuration comes from the command line alone.
CMD ["redis-server", "--protected-mode", "no"]
