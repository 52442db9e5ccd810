# shellcheck shell=bash
# What the scripts share: how they speak, what machine this is, apt sources. To be sourced by bash.

say() { printf '  %s\n' "$*"; }
ok() { printf '\033[32m✓\033[0m %s\n' "$*" | plain_unless_terminal; }
fail() { printf '\033[31m✗\033[0m %s\n' "$*" | plain_unless_terminal 2 >&2; }

# die CODE WHAT [HINT]: 1 failed, 2 usage, 4 this machine (or this user) cannot.
die() {
    fail "$2"
    [ -z "${3:-}" ] || printf '  %s\n' "$3" >&2
    exit "$1"
}

plain_unless_terminal() {
    if [ -t "${1:-1}" ] && [ -z "${NO_COLOR:-}" ]; then cat; else sed 's/\x1b\[[0-9;]*m//g'; fi
}

is_root() { [ "$(id -u)" = 0 ]; }

cache_root() {
    if [ -n "${GODWIT_CACHE:-}" ]; then
        echo "$GODWIT_CACHE"
    elif is_root; then
        echo /var/cache/godwit
    else
        echo "${HOME:?}/.cache/godwit"
    fi
}

os_release() { (. /etc/os-release && eval "echo \"\${$1:-}\""); }

# A KVM that opens may still not work: nested machines expose the device without the CPU's support.
kvm_usable() {
    [ -r /dev/kvm ] && [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo && : <>/dev/kvm
} 2>/dev/null

installed_packages() {
    # It fails when one of them is unknown; that is an answer, not an error.
    { dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true; } |
        sed -n 's/^installed //p'
}

# missing_packages NAME...: those of them that are not installed, in the given order.
missing_packages() {
    local have name
    have=" $(installed_packages "$@" | tr '\n' ' ')"
    for name in "$@"; do
        [[ $have == *" $name "* ]] || echo "$name"
    done
}

# apt_source_files ETC: every source file that apt would read there.
apt_source_files() {
    local file
    for file in "$1"/sources.list.d/*.sources "$1"/sources.list "$1"/sources.list.d/*.list; do
        [ ! -f "$file" ] || echo "$file"
    done
}

# source_for_suite ETC HAVE WANT [URI...]: prints an apt source for suite WANT, made from the
# configured source that serves component main of suite HAVE: same address, same keys, same options.
# The first line says which form it has ("sources" or "list"). With URIs, only a source at one of
# them counts (other archives use the same suite names). Fails when there is none.
source_for_suite() {
    local etc=$1 have=$2 want=$3 file form
    shift 3
    while read -r file; do
        form=${file##*.}
        [ "$form" = sources ] || form=list
        "derive_$form" "$file" "$have" "$want" " $* " && return 0
    done < <(apt_source_files "$etc")
    return 1
}

# deb822: the stanza as it is, with other suites; comments go, multi-line keys stay.
derive_sources() {
    awk -v have="$2" -v want="$3" -v uris="$4" '
        function has(list, word) { return index(" " list " ", " " word " ") > 0 }
        function known(list,   n, i, part) {
            if (uris !~ /[^ ]/) return 1
            n = split(list, part, " ")
            for (i = 1; i <= n; i++) { sub(/\/+$/, "", part[i]); if (has(uris, part[i])) return 1 }
            return 0
        }
        function finish(   i) {
            if (!found && has(field["types"], "deb") && has(field["suites"], have) &&
                has(field["components"], "main") && known(field["uris"]) &&
                tolower(field["enabled"]) !~ /no|false|off|0/) {
                print "sources"
                print "Types: deb"
                print "Suites: " want
                print "Components: main"
                for (i = 1; i <= kept; i++) print keep[i]
                found = 1
            }
            split("", field); split("", keep); kept = 0; key = ""
        }
        /^#/ { next }
        /^[ \t]*$/ { finish(); next }
        {
            value = $0
            if ($0 !~ /^[ \t]/) {
                key = tolower(substr($0, 1, index($0, ":") - 1))
                value = substr($0, index($0, ":") + 1)
            }
            gsub(/[ \t]+/, " ", value); sub(/^ /, "", value); sub(/ $/, "", value)
            field[key] = field[key] (field[key] == "" ? "" : " ") value
            if (key !~ /^(types|suites|components|enabled)$/) keep[++kept] = $0
        }
        END { finish(); exit !found }' "$1"
}

# One line each: "deb [options] address suite component...".
derive_list() {
    awk -v have="$2" -v want="$3" -v uris="$4" '
        { sub(/#.*/, "") }
        /^[ \t]*deb[ \t]/ {
            line = $0
            sub(/^[ \t]*deb[ \t]+/, "", line)
            options = ""
            if (match(line, /^\[[^]]*\][ \t]+/)) {
                options = substr(line, 1, RLENGTH)
                line = substr(line, RLENGTH + 1)
                sub(/[ \t]+$/, " ", options)
            }
            n = split(line, part, " ")
            if (part[2] != have) next
            bare = part[1]; sub(/\/+$/, "", bare)
            if (uris ~ /[^ ]/ && index(uris, " " bare " ") == 0) next
            for (i = 3; i <= n; i++) if (part[i] == "main") {
                print "list"
                print "deb " options part[1] " " want " main"
                found = 1
                exit
            }
        }
        END { exit !found }' "$1"
}

# archive_uris ORIGIN CODENAME: addresses that serve that archive, as apt knows from its lists.
archive_uris() {
    apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' \
        "Origin: $1" "Codename: $2" 'Created-By: Packages' 2>/dev/null |
        sed -n 's|/* main$||p' | sort -u
}
