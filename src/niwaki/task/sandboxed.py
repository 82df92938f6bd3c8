"""What runs inside of the sandbox, in an interpreter of its own with the standard library alone: it gives up what it
may do, runs a solution, asks for its tests, runs them, and says that they ran. `sandbox.py` starts it, by its path.

Given up, by Linux's own means, none of which needs root: limits of memory, processor, files (setrlimit); reading but
for Python's own files and writing but for one folder, in which a file that is made stays, under its name (Landlock,
kernel 5.13); and, by a filter of system calls
(seccomp), sockets, other processes and programs, signals to others, tracing, mounts, clocks, owners and modes of files,
news of files (inotify), and every call that is newer than the list below.

Not given up, since neither Landlock nor the filter can refuse it alone: to ask whether a file outside is there, how
long it is, whose, and when it changed (stat, readlink), and so which processes there are (/proc); names, not contents,
in the folders of Python; the clock.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
import types

READY, LOADED, TESTED, PASSED, FAILED, REFUSED = b"R", b"L", b"T", b"P", b"F", b"X"
EPERM, ENOSYS = 1, 38

# Numbers of system calls: x86_64, then aarch64 where there is such a call.
CALLS = {
    "socket": (41, 198), "socketpair": (53, 199),
    "fork": (57,), "vfork": (58,), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116), "fanotify_init": (300, 262),
    "inotify_init": (253,), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "personality": (135, 92), "vhangup": (153, 58),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "iopl": (172,), "ioperm": (173,), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "chmod": (90,), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92,),
    "fchown": (93, 55), "lchown": (94,), "fchownat": (260, 54), "utime": (132,), "utimes": (235,),
    "utimensat": (280, 88), "futimesat": (261,), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "fallocate": (285, 47), "memfd_create": (319, 279), "memfd_secret": (447, 447), "prctl": (157, 167),
    "seccomp": (317, 277),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # place in the list, AUDIT_ARCH
CLONE, FCNTL, OPEN, OPENAT, OPENAT2 = (56, 220), (72, 25), (2,), (257, 56), 437
CLONE3, NEWEST = 435, 452  # what a C library tries first for a thread; the last call that is known here
CLONE_THREAD = 0x10000
O_TMPFILE = 0x400000  # a file without a name
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15  # whom the kernel signals when a file has news

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT, THIRD_ARGUMENT = (
    0,
    4,
    16,
    24,
    32,
)  # offsets in struct seccomp_data, low halves

# Rights of Landlock, in the order of the bits.
WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG, TRUNCATE = (1 << bit for bit in (1, 2, 3, 8, 14))
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # from this version on
READ = READ_FILE | READ_DIR
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
READABLE = ("/usr/share/zoneinfo", "/etc/localtime", "/dev/urandom")
INSTALLED = ("site-packages", "dist-packages")  # what somebody added to Python


def limit(memory: int, seconds: int, file: int, files: int) -> None:
    """Bytes of memory, seconds of processor, bytes of a file, files that are open; no process but this one."""
    for kind, most in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, files), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def called(library: ctypes.CDLL, what: str, *values: object) -> int:
    """What a call of the C library gives; OSError where it fails."""
    found: int = getattr(library, what)(*values)
    if found < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return found


def without_installed(folder: str) -> dict[str, int]:
    """Rights to read a folder of libraries, but for the packages that somebody added to a Python in it."""
    found = {folder: READ_DIR}  # of all names below it: modules are looked for in a list of them
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return {}
    for entry in entries:
        if entry.is_symlink() or entry.name in INSTALLED:
            continue
        of_python = entry.is_dir() and entry.name.startswith(("python", "pypy"))
        found |= without_installed(entry.path) if of_python else {entry.path: READ}
    return found


def give_up_files(library: ctypes.CDLL, folder: str) -> None:
    """Read Python's own files, write in `folder`, and nothing else of any file system."""
    version = called(library, "syscall", 444, None, 0, 1)
    rights = RIGHTS[max(known for known in RIGHTS if known <= version)]
    parts = [rights] + [3] * (version >= 4) + [3] * (version >= 6)  # files; TCP; sockets of others, signals to others
    rules = ctypes.create_string_buffer(struct.pack(f"={len(parts)}Q", *parts))
    ruleset = called(library, "syscall", 444, rules, 8 * len(parts), 0)
    # Plain files, side by side, that stay: what is removed and still mapped takes room that nobody sees.
    inside = READ | WRITE_FILE | MAKE_REG | TRUNCATE
    own = [
        os.path.join(prefix, name) for prefix in (sys.base_prefix, sys.base_exec_prefix) for name in ("lib", "lib64")
    ]
    allowed = dict.fromkeys(READABLE, READ)
    for folder_of_libraries in dict.fromkeys(
        map(os.path.realpath, (*LIBRARIES, *own, *filter(os.path.isdir, sys.path)))
    ):
        allowed |= without_installed(folder_of_libraries)
    for path, access in {**allowed, "/dev/null": READ | WRITE_FILE, folder: inside}.items():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            access &= rights if os.path.isdir(path) else rights & (READ_FILE | WRITE_FILE)
            rule = ctypes.create_string_buffer(struct.pack("=Qi", access, place), 12)
            called(library, "syscall", 445, ruleset, 1, rule, 0)
            os.close(place)
    called(library, "syscall", 446, ruleset, 0)
    os.close(ruleset)


def filter_of(machine: str) -> bytes:
    """The filter of system calls, as the kernel's instructions: (code, jump if true, jump if false, number)."""
    column, architecture = MACHINES[machine]
    refused = sorted(numbers[column] for numbers in CALLS.values() if len(numbers) > column)
    lines = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, NEWEST + 1), (RETURN, 0, 0, ERRNO | ENOSYS),  # those of another convention too
        (EQUAL, 1, 0, CLONE3), (EQUAL, 0, 1, OPENAT2), (RETURN, 0, 0, ERRNO | ENOSYS),
    ]  # fmt: skip
    for number in refused:
        lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | EPERM)]
    for numbers, flags in ((OPEN, SECOND_ARGUMENT), (OPENAT, THIRD_ARGUMENT)):
        if len(numbers) > column:
            lines += [
                (EQUAL, 0, 4, numbers[column]), (LOAD, 0, 0, flags), (ANY_BIT, 0, 1, O_TMPFILE),
                (RETURN, 0, 0, ERRNO | EPERM), (RETURN, 0, 0, ALLOW),
            ]  # fmt: skip
    lines += [
        (EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, ERRNO | EPERM), (RETURN, 0, 0, ALLOW),
        (EQUAL, 0, 5, FCNTL[column]), (LOAD, 0, 0, SECOND_ARGUMENT), (EQUAL, 2, 0, F_SETOWN), (EQUAL, 1, 0, F_SETSIG),
        (EQUAL, 0, 1, F_SETOWN_EX), (RETURN, 0, 0, ERRNO | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def give_up_calls(library: ctypes.CDLL) -> None:
    """Every system call that the filter refuses, for good."""
    code = filter_of(platform.machine())
    instructions = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions)))
    called(library, "prctl", 22, 2, program, 0, 0)


def isolate(folder: str) -> None:
    """Give up files and system calls.

    Raises:
        OSError: the kernel cannot.
    """
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        raise OSError(f"{platform.system()} on {platform.machine()} has no such filter of system calls")
    library = ctypes.CDLL(None, use_errno=True)
    called(library, "prctl", 1, 9, 0, 0, 0)  # dies with its parent
    called(library, "prctl", 38, 1, 0, 0, 0)  # no program that is run has more rights
    give_up_files(library, folder)
    give_up_calls(library)


def kept_track_of(library: ctypes.CDLL) -> None:
    """Go on in a process of its own. The one that was here (Linux) becomes the parent of all that loses its own, of any
    session, and ends them where that process ends or SIGTERM says so."""
    called(library, "prctl", 36, 1, 0, 0, 0)
    called(library, "prctl", 1, signal.SIGTERM, 0, 0, 0)  # where its parent ends
    awaited = {signal.SIGTERM, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    own = os.fork()
    if own == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os.closerange(3, 256)  # the pipes are the other's
    status = None
    while status is None and signal.sigwait(awaited) != signal.SIGTERM:
        status = ended_children().get(own)
    while children := children_of(os.getpid()):
        for child in children:
            os.kill(child, signal.SIGKILL)
        ended_children()
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status) if status is not None else 1
    if code < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(code)


def ended_children() -> dict[int, int]:
    """The status of each child that has ended, which is then forgotten."""
    found: dict[int, int] = {}
    try:
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            found[child[0]] = child[1]
    except ChildProcessError:
        pass
    return found


def children_of(parent: int) -> list[int]:
    """The processes that a process started, or that were left to it."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == parent:
            found.append(int(name))
    return found


def execute(text: str, kind: str, names: dict[str, object]) -> None:
    """Run Python: the frame that the program can look up to."""
    run = exec
    code = compile(text, kind, "exec", dont_inherit=True)
    del text
    run(code, names)


def restore(kept: dict[str, object]) -> None:
    """Python's own names as they were."""
    own = builtins.__dict__
    own.update(kept)
    for name in [name for name in own if name not in kept]:
        del own[name]


def main(report: int, told: int) -> None:
    """Run what stands in the standard input, as JSON; by the pipe `report` this process says how it went, by `told` it
    hears the tests once the solution is loaded, and once they have run what it has to say then."""
    read, write, untrace, unprofile, leave = os.read, os.write, sys.settrace, sys.setprofile, os._exit
    job = json.loads(sys.stdin.buffer.read())
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    solution, isolated = job["solution"], job["isolated"]
    try:
        if not isolated and platform.system() == "Linux":
            kept_track_of(ctypes.CDLL(None, use_errno=True))
        limit(job["memory"], job["seconds"], job["file"], job["files"])
        if isolated:
            isolate(os.getcwd())
    except Exception as error:
        write(report, REFUSED + f"{type(error).__name__}: {error}".encode())
        leave(1)
    # Before anyone can put others in their place.
    start, again, kept, from_bytes = execute, restore, dict(builtins.__dict__), int.from_bytes
    names = module.__dict__
    del job
    write(report, READY)
    try:
        # Apart, so that no solution can make the tests a part of a text or of a branch of its own.
        start(solution, "solution", names)
        untrace(None)
        unprofile(None)
        again(kept)
        names["__builtins__"] = builtins
        write(report, LOADED)
        heard = b""
        size = from_bytes(read(told, 8), "little")
        while len(heard) < size:
            heard += read(told, size - len(heard)) or leave(1)  # there is nobody to ask
        start(heard.decode(), "tests", names)
    except BaseException as error:
        kind = type(error).__name__
        try:
            said = f"{kind}: {error}" if str(error) else kind
        except BaseException:
            said = kind
        write(report, FAILED + said[:200].encode(errors="replace"))
        leave(1)
    write(report, TESTED)
    write(report, PASSED + read(told, 64))
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
