#!/bin/sh
# Writes the keys of the stack once: readable by uid and gid 1000, which the containers run as, and by nobody else.
set -eu
umask 027
folder=$(dirname "$0")/secrets
mkdir -p "$folder"
random() { python3 -c 'import secrets; print(secrets.token_urlsafe(32))'; }
write() {
    if [ ! -e "$folder/$1" ]; then
        cat > "$folder/$1"
        echo "made $folder/$1"
    fi
}
{ echo "tavlad$(random | tr -dc a-z0-9 | cut -c1-12)"; random; } | write s3_keys
random | tr -d '\n' | write postgres_password
random | tr -d '\n' | write ray_token
chown -R 1000:1000 "$folder"
chmod 750 "$folder"
chmod 640 "$folder"/*
