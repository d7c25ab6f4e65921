# Shared by the scripts in this folder; sourced, never run.
# Owns: where things lie (the repository, the private copies of Postgres, the cache) and how an
# installation of Postgres is found. Nothing here writes outside `target/` and the cache.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
CACHE=${TANDEM_CACHE:-$HOME/.cache/tandem}
SUPPORTED="15 16 17 18"
PGRX_VERSION=0.18.1

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The account that runs servers: Postgres refuses to run as root.
server_user() { if [ "$(id -u)" = 0 ]; then echo postgres; else id -un; fi; }

as_server_user() {
    if [ "$(id -u)" = 0 ]; then (cd / && runuser -u postgres -- "$@"); else "$@"; fi
}

major_of() { "$1" --version 2>/dev/null | sed -nE 's/^PostgreSQL ([0-9]+).*/\1/p'; }

# Can extensions be built against this pg_config? (libpq-dev brings one without server headers.)
has_headers() { [ -f "$("$1" --includedir-server 2>/dev/null)/postgres.h" ] && [ -x "$("$1" --bindir)/postgres" ]; }

# find_pg_config MAJOR: prints the pg_config of an installation, or nothing.
find_pg_config() {
    local major=$1 var=PG_CONFIG_$1 candidate
    for candidate in "${!var:-}" "/usr/lib/postgresql/$major/bin/pg_config" \
        "$CACHE/postgres/$major/pg_config" "$(command -v pg_config || true)"; do
        if [ -n "$candidate" ] && [ -x "$candidate" ] && [ "$(major_of "$candidate")" = "$major" ] && has_headers "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

found_versions() {
    local major
    for major in $SUPPORTED; do
        if [ -n "$(find_pg_config "$major")" ]; then echo "$major"; fi
    done
}

# The folder of the private copies. It must be open to the account that runs the servers; a clone
# under /root is not, so the copies then lie in /var/tmp and target/pg is a link to them.
private_home() {
    local home=$TARGET/pg
    if [ ! -e "$home" ]; then
        mkdir -p "$TARGET"
        if as_server_user test -x "$TARGET" 2>/dev/null; then
            mkdir -p "$home"
        else
            local away
            away=/var/tmp/tandem-$(printf %s "$TARGET" | cksum | cut -d' ' -f1)/pg
            mkdir -p "$away"
            ln -s "$away" "$home"
        fi
    fi
    # Without links: the way through /root is closed to servers.
    readlink -f "$home"
}
