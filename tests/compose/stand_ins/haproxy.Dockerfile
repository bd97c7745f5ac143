FROM nibble-stand-in/debian
RUN apt-get update \
 && apt-get install -y --no-install-recommends haproxy wget \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && mkdir -p /usr/local/etc/haproxy
STOPSIGNAL SIGUSR1
USER haproxy
CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
