# Prometheus 2.42; the real image has another user number and the same paths.
FROM nibble-stand-in/debian
RUN apt-get update \
 && apt-get install -y --no-install-recommends prometheus wget \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && rm -rf /etc/prometheus && mkdir -p /etc/prometheus /prometheus && chown nobody:nogroup /prometheus
WORKDIR /prometheus
USER nobody
ENTRYPOINT ["prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
