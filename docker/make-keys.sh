#!/bin/sh
# A key for each name given, as NAME:PERMISSIONS, unless it has one. No key is printed: each goes into a file of its own.
#   /keys/teacher-keys.json   hashes, for the teachers     /keys-of-clients/NAME/key   the key, for that client alone
set -eu
umask 027
if [ -s /keys/teacher-keys.json ] && [ ! -w /keys ]; then
    echo "the keys in /keys are the operator's and are used as they are"
    exit 0
fi
for client in "$@"; do
    name=${client%%:*}
    file=/keys-of-clients/$name/key
    if [ -s "$file" ]; then
        echo "$name has a key"
        continue
    fi
    mkdir -p "/keys-of-clients/$name"
    python -m teacher_server keys add "$name" --may "${client#*:}" > "$file.new" 2> /dev/null
    mv "$file.new" "$file"
    echo "made a key for $name"
done
password=/keys-of-clients/grafana/password
if [ ! -s "$password" ]; then
    mkdir -p "${password%/*}"
    openssl rand -hex 24 > "$password"
fi
