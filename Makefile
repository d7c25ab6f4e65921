# Thin: each target is a script in scripts/, which says what it does at its top.

.PHONY: test demo install lint setup

# PG="15 18": these versions; PG=all: every supported one, fetched if need be; unset: those found.
test:
	@PG="$(PG)" scripts/test

# KEEP=1 leaves the two servers running.
demo:
	@PG="$(PG)" KEEP="$(KEEP)" scripts/demo

# Into a real server: make install PG_CONFIG=/usr/lib/postgresql/15/bin/pg_config
install: setup
	@scripts/install $(PG_CONFIG)

lint: setup
	@scripts/lint

setup:
	@scripts/setup
