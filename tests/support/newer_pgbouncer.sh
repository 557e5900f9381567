#!/usr/bin/env bash
# Unpacks a PgBouncer that is newer than this machine's, from a later release of Debian, into the
# directory that is the first argument. Nothing is installed: `bin/pgbouncer` there runs the program
# by its own loader, with its own libraries. Needs root (for apt) and Debian's own apt sources, whose
# mirror is asked for the later release, too.
set -euo pipefail

release=trixie
into=$1
programs="pgbouncer libc6 libevent-2.1-7t64 libssl3t64 libcares2 libpam0g libsystemd0 libaudit1
    libcap-ng0 libcap2 libzstd1 zlib1g liblzma5 liblz4-1 libgcc-s1 libgcrypt20 libgpg-error0"

mirror=$(apt-get indextargets --format '$(SITE) $(ORIGIN)' 2>/dev/null | awk '$2 == "Debian" && $1 !~ /security/ { print $1; exit }')
keys=/usr/share/keyrings/debian-archive-keyring.gpg
if [ -z "$mirror" ] || [ ! -f "$keys" ]; then
    echo "none of the sources of apt is a mirror of Debian: name a newer PgBouncer with PGBOUNCER_NEWER=" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,debs,root}
chmod -R a+rwX "$work"
echo "deb [signed-by=$keys] $mirror $release main" >"$work/sources.list"
options=(
    -q -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root
)
apt-get "${options[@]}" update
# shellcheck disable=SC2086 # a list
(cd "$work/debs" && apt-get "${options[@]}" download $programs)
for deb in "$work"/debs/*.deb; do
    dpkg -x "$deb" "$work/root"
done

rm -rf "$into"
mkdir -p "$into/bin"
mv "$work/root" "$into/root"
chmod -R a+rX "$into"
cat >"$into/bin/pgbouncer" <<'PROGRAM'
#!/bin/sh
root=$(cd "$(dirname "$0")/../root" && pwd)
libraries=$(echo "$root"/usr/lib/*-linux-gnu*)
loader=$(ls "$root"/usr/lib*/ld-linux*.so.* "$root"/usr/lib/*/ld-linux*.so.* 2>/dev/null | head -n 1)
exec "$loader" --library-path "$libraries" "$root/usr/sbin/pgbouncer" "$@"
PROGRAM
chmod a+rx "$into/bin/pgbouncer"
"$into/bin/pgbouncer" --version
