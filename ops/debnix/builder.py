"""Builds one Debian package into $out, with references to its dependencies embedded the way nixpkgs embeds them.

    ELF files   patchelf: RPATH is the store's lib directories with the NEEDED libraries, the interpreter that of libc6
    text        /usr/.., /bin/.., /lib/.. and shebangs (`/usr/bin/env X` too) become the store path that has the file
    symlinks    into another package become absolute store links; those inside the package stay relative
    python      the standard library is byte-compiled, so .pyc files hold $out in co_filename
    roots       instead of a package: a profile, links to (or wrappers around) the programs of the given paths

The output depends on the derivation's environment alone. It runs under real Nix, which finds the references by scanning.
"""
import glob
import os
import re
import shutil
import struct
import subprocess
import sys

ENV = os.environ
ENV["PATH"] = "/usr/bin:/bin"
OUT = ENV["out"]
CLOSURE = ENV.get("closure", "").split()
TOP = ENV["NIX_BUILD_TOP"] + "/unpacked"
# Where a directory of Debian's goes in $out.
PLACES = [("usr/lib/x86_64-linux-gnu", "lib"), ("lib/x86_64-linux-gnu", "lib"), ("lib64", "lib"), ("usr", "")]
DROPPED = re.compile(r"^usr/share/(lintian|doc/[^/]*/(NEWS|[Cc]hange).*)")
PATH = re.compile(rb"(?<![A-Za-z0-9_.$})~/-])/(?:usr/)?(?:s?bin|lib|lib64|share|include|libexec|games)(?:/[A-Za-z0-9_.+@-]+)+")

files = {}  # path in $out -> path in TOP, of every file and symlink
directories = set()
found = {}  # path in an output -> the store path of the closure that has it
libraries = {}  # file name -> the directory that has it


def place(path):
    """A path inside the package -> the path inside $out."""
    for old, new in PLACES:
        if path == old or path.startswith(old + "/"):
            return (new + path[len(old):]).lstrip("/")
    return path


def scan():
    for directory, inner, names in os.walk(TOP):
        inner.sort()
        relative = os.path.relpath(directory, TOP)
        for name in sorted(names + [name for name in inner if os.path.islink(f"{directory}/{name}")]):
            path = name if relative == "." else f"{relative}/{name}"
            if DROPPED.match(path):
                continue
            files.setdefault(place(path), path)
            parent = os.path.dirname(place(path))
            while parent and parent not in directories:
                directories.add(parent)
                parent = os.path.dirname(parent)


def owner(path):
    """The store path that has `path`: $out first, then the closure, nearest first; or None."""
    if path in files or path in directories:
        return OUT
    if path not in found:
        found[path] = next((store_path for store_path in CLOSURE if os.path.lexists(f"{store_path}/{path}")), None)
    return found[path]


def store_form(match):
    text = match[0].decode()
    stripped = text.rstrip(".,-+@")
    path, rest = place(stripped[1:]), text[len(stripped):]
    if "/" not in path and path not in files:
        # /usr/share and the like say nothing, but our own lib and include directories do.
        return f"{OUT}/{path}{rest}".encode() if path in directories and path in ("lib", "include") else match[0]
    home = owner(path)
    return f"{home}/{path}{rest}".encode() if home else match[0]


def patched_text(content):
    if content[:2] == b"#!":
        line, newline, rest = content.partition(b"\n")
        match = re.match(rb"#!\s*/usr/bin/env\s+(?:-S\s+)?([A-Za-z0-9._+-]+)", line)
        home = match and owner("bin/" + match[1].decode())
        if home:
            line = b"#!" + f"{home}/bin/".encode() + match[1] + line[match.end():]
        content = line + newline + rest
    content = PATH.sub(store_form, content)
    return re.sub(rb"(?m)^(prefix\s*=\s*)/usr$", lambda match: match[1] + OUT.encode(), content)


def dynamic(elf):
    """-> (has an interpreter, [NEEDED]) of a dynamic 64-bit ELF file, or None."""
    kind, = struct.unpack_from("<H", elf, 16)
    if elf[4:6] != b"\x02\x01" or kind not in (2, 3):
        return None
    offset, = struct.unpack_from("<Q", elf, 32)
    count, = struct.unpack_from("<H", elf, 56)
    headers = [struct.unpack_from("<IIQQQQQQ", elf, offset + 56 * index) for index in range(count)]
    table = next((header for header in headers if header[0] == 2), None)
    if not table:
        return None
    tags = list(struct.iter_unpack("<QQ", elf[table[2]:table[2] + table[5] // 16 * 16]))
    address = next(value for tag, value in tags if tag == 5)
    strings = next(header[2] + address - header[3] for header in headers
                   if header[0] == 1 and header[3] <= address < header[3] + header[6])
    needed = [elf[strings + value:elf.index(b"\0", strings + value)].decode() for tag, value in tags if tag == 1]
    return any(header[0] == 3 for header in headers), needed


def library_directory(name):
    if not libraries:
        for path in sorted(files, reverse=True):
            if ".so" in path:
                libraries[os.path.basename(path)] = f"{OUT}/{os.path.dirname(path)}"
        for store_path in reversed(CLOSURE):
            if os.path.isdir(f"{store_path}/lib"):
                for file in os.listdir(f"{store_path}/lib"):
                    if ".so" in file:
                        libraries[file] = f"{store_path}/lib"
    return libraries.get(name)


def patch_elf(path, interpreted, needed):
    nearness = {store_path: index for index, store_path in enumerate([OUT, *CLOSURE])}
    places = {library_directory(name) for name in needed} - {None}
    arguments = []
    if places:
        by_nearness = sorted(places, key=lambda directory: nearness["/".join(directory.split("/")[:4])])
        arguments += ["--set-rpath", ":".join(by_nearness)]
    loader = interpreted and library_directory("ld-linux-x86-64.so.2")
    if loader:
        arguments += ["--set-interpreter", f"{loader}/ld-linux-x86-64.so.2"]
    # Without --no-sort patchelf 0.18 leaves a program at a fixed address, as Debian's python3 is one, that crashes at once.
    if arguments and subprocess.run(["patchelf", "--no-sort", *arguments, path], stderr=subprocess.DEVNULL).returncode:
        print("patchelf failed:", path, file=sys.stderr)


def install_link(path, source):
    link = os.readlink(f"{TOP}/{source}")
    wanted = place(os.path.normpath(os.path.join("/" + os.path.dirname(source), link))[1:])
    home = owner(wanted)
    relative = os.path.relpath(wanted, os.path.dirname(path))
    os.symlink(relative if home == OUT else f"{home or ''}/{wanted}", f"{OUT}/{path}")


def install_file(path, source, patch):
    with open(f"{TOP}/{source}", "rb") as file:
        content = file.read()
    if content[:4] == b"\x7fELF":
        shutil.copyfile(f"{TOP}/{source}", f"{OUT}/{path}")
        linked = dynamic(content) if patch else None
        if linked and linked[1]:
            patch_elf(f"{OUT}/{path}", *linked)
    else:
        if b"\0" not in content[:8192] and content[:2] != b"\x1f\x8b" and b"/" in content:
            content = patched_text(content)
        with open(f"{OUT}/{path}", "wb") as file:
            file.write(content)
    os.chmod(f"{OUT}/{path}", 0o755 if os.stat(f"{TOP}/{source}").st_mode & 0o111 else 0o644)


def build_package():
    subprocess.run(["dpkg-deb", "-x", f"/debs/{ENV['sha256']}", TOP], check=True)
    scan()
    for directory in ["", *sorted(directories)]:
        os.makedirs(f"{OUT}/{directory}", exist_ok=True)
    for path, source in sorted(files.items()):
        if os.path.islink(f"{TOP}/{source}"):
            if path not in directories:
                install_link(path, source)
        else:
            # libc6 holds the loader itself, which patchelf must leave alone.
            install_file(path, source, patch=not ENV["name"].startswith("libc6-"))
    if ENV["name"].startswith("bash-"):
        os.symlink("bash", f"{OUT}/bin/sh")  # as in nixpkgs
    if re.match("(lib)?python3", ENV["name"]):
        compile_all = ["/usr/bin/python3", "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", OUT]
        subprocess.run(compile_all, env={"PYTHONHASHSEED": "0"}, stdout=subprocess.DEVNULL)


# Interpreters look for their modules where Debian compiled them in, which is nowhere on a machine without Debian; as in
# nixpkgs a wrapper tells them. Program -> (variable, the directories of modules).
WRAPPED = {
    re.compile(r"python3(\.\d+)?"): ("PYTHONPATH", ["lib/python3*", "lib/python3*/lib-dynload"]),
    re.compile(r"perl"): ("PERL5LIB", ["lib/perl-base", "lib/perl/5.??", "share/perl/5.??", "share/perl5"]),
}


def build_profile(roots):
    os.makedirs(f"{OUT}/bin")
    shell = next(f"{root}/bin/bash" for root in roots if os.path.exists(f"{root}/bin/bash"))
    programs = {}
    for root in roots:
        for path in sorted(glob.glob(f"{root}/bin/*")):
            programs.setdefault(os.path.basename(path), path)
    for name, path in programs.items():
        wrapper = next((found for pattern, found in WRAPPED.items() if pattern.fullmatch(name)), None)
        if not wrapper:
            os.symlink(path, f"{OUT}/bin/{name}")
            continue
        variable, places = wrapper
        modules = ":".join(found for place in places for home in CLOSURE for found in sorted(glob.glob(f"{home}/{place}")))
        with open(f"{OUT}/bin/{name}", "w", encoding="utf-8") as file:
            file.write(f"#!{shell}\n{variable}={modules} exec {path} \"$@\"\n")
        os.chmod(f"{OUT}/bin/{name}", 0o755)


if "roots" in ENV:
    build_profile(ENV["roots"].split())
else:
    build_package()
