# pgtandem in a small image:
#   docker build -t pgtandem .
#   docker run -p 6432:6432 -v "$PWD/proxy.yaml:/etc/pgtandem/proxy.yaml:ro" pgtandem
# In proxy.yaml, `listen: 0.0.0.0:6432`, and files that are written (mismatch_log) under
# /var/lib/pgtandem, on a volume if they shall outlive the container.

FROM rust:1-slim-bookworm AS build
WORKDIR /build
COPY . .
RUN cargo build --release --locked --bin pgtandem

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --no-create-home --home-dir /var/lib/pgtandem \
        --shell /usr/sbin/nologin pgtandem \
    && install -d -o pgtandem -g pgtandem /etc/pgtandem /var/lib/pgtandem
COPY --from=build /build/target/release/pgtandem /usr/local/bin/pgtandem
USER pgtandem
WORKDIR /var/lib/pgtandem

# Clients; the admin address serves /healthz, /readyz and /metrics where proxy.yaml puts it.
EXPOSE 6432 6433
# Asks the running proxy over its admin address. Exit code 2 means that it does not answer; 1 that
# something is wrong which restarting the proxy would not mend (a server is down, say).
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD pgtandem status --config /etc/pgtandem/proxy.yaml > /dev/null; test $? -ne 2
# The proxy drains its sessions on SIGTERM, which is what `docker stop` sends.
ENTRYPOINT ["pgtandem"]
CMD ["serve", "--config", "/etc/pgtandem/proxy.yaml"]
