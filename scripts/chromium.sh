#!/bin/sh
# The test of the report page opens it in a real browser. Install one where this machine lets us
# (root and apt-get); elsewhere the page's test says that it was skipped, and why.
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium: not installed (needs root and apt-get); the page test will be skipped"
    exit 0
fi
echo "chromium: installing it for the page test"
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
    >/dev/null || echo "chromium: apt-get failed; the page test will be skipped"
