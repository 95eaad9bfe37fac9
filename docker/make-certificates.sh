#!/bin/sh
# An authority and the teacher's certificate, as far as they are not there or soon end; a running teacher takes a new one in.
#   /authority/ca.key   stays with this service     /ca/ca.pem       for all clients
#   /tls/server.{pem,key}   for the teachers        TLS_NAMES        further names or addresses, "DNS:node-1,IP:192.0.2.7"
# With the argument `keep` it stays and looks twice a day.
set -eu
umask 027
if [ "${1:-}" = keep ]; then
    trap 'exit 0' TERM INT
    while "$0"; do
        sleep "${RENEW_S:-43200}" &
        wait $!
    done
    exit 1
fi
if [ -s /tls/server.pem ] && [ ! -w /tls ]; then
    echo "the certificate in /tls is the operator's and is used as it is"
    exit 0
fi
names="DNS:teacher,DNS:teacher-cpu,DNS:localhost,IP:127.0.0.1${TLS_NAMES:+,$TLS_NAMES}"
if [ ! -s /authority/ca.key ] || [ ! -s /ca/ca.pem ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj "/CN=teacher authority" \
        -keyout /authority/ca.key -out /ca/ca.pem 2> /dev/null
    chmod 0600 /authority/ca.key
    chmod 0644 /ca/ca.pem
    rm -f /tls/server.pem
fi
month=2592000
if [ -s /tls/server.pem ] && openssl x509 -checkend $month -noout -in /tls/server.pem > /dev/null \
    && [ "$(cat /tls/names 2> /dev/null)" = "$names" ]; then
    echo "the certificate is good for $names for more than a month"
    exit 0
fi
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=teacher" \
    -keyout "$new/server.key" -out "$new/server.csr" 2> /dev/null
printf "subjectAltName=%s\n" "$names" > "$new/names"
openssl x509 -req -in "$new/server.csr" -CA /ca/ca.pem -CAkey /authority/ca.key -CAserial "$new/serial" -CAcreateserial \
    -days 365 -extfile "$new/names" -out "$new/server.pem" 2> /dev/null
cp "$new/server.key" /tls/server.key
cp "$new/server.pem" /tls/server.pem
printf "%s\n" "$names" > /tls/names
echo "made a certificate for $names, good for a year"
