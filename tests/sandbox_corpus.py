"""What a hostile program might try, as data: run by test_execution.py through the real sandbox, as whoever runs the tests and as an ordinary user.

    python -m tests.sandbox_corpus escapes|forgeries|bombs [mount]    # one part, as the present user, also without the namespace; prints JSON
    python -m tests.sandbox_corpus bare                               # the escapes without a sandbox: which are real on this machine

ESCAPES run one after the other in one sandboxed process; each has to be refused, and nothing outside may have changed. The targets are a
folder, a module that counts as Python's own, servers and a process of the runner, and the runner itself.
"""
import concurrent.futures
import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from nanochat import sandbox
from nanochat.execution import execute_code

REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS, errno.ENOTSUP, errno.EXDEV}

NUMBERS = {  # system call: x86_64, aarch64
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execveat": (322, 281), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "tkill": (200, 130), "tgkill": (234, 131), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "move_pages": (279, 239), "migrate_pages": (256, 238), "prlimit64": (302, 261),
    "capset": (126, 91), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241), "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97),
    "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "open_tree": (428, 428), "fsopen": (430, 430), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "swapon": (167, 224), "reboot": (169, 142), "init_module": (175, 105), "kexec_load": (246, 104),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "sethostname": (170, 161), "syslog": (103, 116),
    "acct": (163, 89), "quotactl": (179, 60), "personality": (135, 92), "seccomp": (317, 277), "landlock_create_ruleset": (444, 444),
    "mlockall": (151, 230), "timer_create": (222, 107), "vmsplice": (278, 75), "membarrier": (324, 283), "sync": (162, 81),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "fchmodat": (268, 53), "utimensat": (280, 88),
    "truncate": (76, 45), "mbind": (237, 235), "vhangup": (153, 58), "openat2": (437, 437), "mknodat": (259, 33), "newest": (500, 500),
}

PRELUDE = """
import ctypes, errno, fcntl, json, mmap, os, posix, signal, socket, struct, sys, _posixsubprocess, _socket
globals().update(json.loads({targets!r}))
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def syscall(name, *args):
    number = NUMBERS[name][os.uname().machine == "aarch64"]
    if number is None:
        raise PermissionError(errno.EPERM, "not on this machine")
    return done(libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args]))
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def iovec(): return ctypes.byref(Iovec(ctypes.cast(ctypes.create_string_buffer(8), ctypes.c_void_p).value, 8))
def owned(): return os.open("mine", os.O_RDWR | os.O_CREAT)
"""

# name: a program that has achieved something if it does not raise. `target` is a process, `victim` a file and `outside` its folder.
ESCAPES = {
    "inherited files": """
        def kind(fd):
            try: return os.fstat(fd).st_mode >> 12
            except OSError: return None
        extra = [fd for fd in range(3, 1024) if kind(fd) is not None]
        if not extra: raise PermissionError(errno.EPERM, 'none')""",
    # signals that the kernel sends for a file
    "F_SETOWN": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, target)",
    "F_SETOWN of the parent's group": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, -target)",
    "F_SETOWN_EX": "fcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, target))",
    "F_SETSIG": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, signal.SIGKILL)",
    "O_ASYNC": "r = os.pipe()[0]; fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | fcntl.fcntl(r, fcntl.F_GETFL))",
    "FIOASYNC": "fcntl.ioctl(os.pipe()[0], 0x5452, struct.pack('i', 1))",
    "FIOSETOWN": "fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', target))",
    "SIOCSPGRP": "fcntl.ioctl(socket.socketpair()[0], 0x8902, struct.pack('i', target))",
    "upper half of an ioctl": "done(libc.ioctl(socket.socketpair()[0].detach(), ctypes.c_ulong(0x100008901), ctypes.byref(ctypes.c_int(target))))",
    "lease": "fcntl.fcntl(os.open(module, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "directory notification": "fcntl.fcntl(os.open(os.path.dirname(module), os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS)",
    "lock on Python's own file": "fcntl.flock(os.open(module, os.O_RDONLY), fcntl.LOCK_EX)",
    "pipe size": "fcntl.fcntl(os.pipe()[0], 1031, 2 ** 20)",
    "TIOCSTI": "fcntl.ioctl(1, 0x5412, b'x')",
    "TIOCSCTTY": "fcntl.ioctl(1, 0x540E, 0)",
    "timer with a signal": "syscall('timer_create', 0, None, ctypes.byref(ctypes.c_int()))",
    # other processes
    "kill": "posix.kill(target, signal.SIGKILL)",
    "kill the parent": "posix.kill(os.getppid(), signal.SIGUSR1)",
    "kill all": "posix.kill(-1, signal.SIGUSR1)",
    "kill a group": "posix.killpg(target, signal.SIGKILL)",
    "stop": "posix.kill(target, signal.SIGSTOP)",
    "probe": "posix.kill(target, 0)",
    "tkill": "syscall('tkill', target, 9)",
    "tgkill": "syscall('tgkill', target, target, 9)",
    "rt_sigqueueinfo": "syscall('rt_sigqueueinfo', target, 9, struct.pack('iiiiQQ', 9, 0, -1, 0, 0, 0) + bytes(96))",
    "rt_tgsigqueueinfo": "syscall('rt_tgsigqueueinfo', target, target, 9, struct.pack('iiiiQQ', 9, 0, -1, 0, 0, 0) + bytes(96))",
    "pidfd_open": "syscall('pidfd_open', target, 0)",
    "pidfd_send_signal": "syscall('pidfd_send_signal', os.open(f'/proc/{target}', os.O_RDONLY), 9, None, 0)",
    "pidfd_getfd": "syscall('pidfd_getfd', syscall('pidfd_open', target, 0), 0, 0)",
    "ptrace": "syscall('ptrace', 0x4206, target, None, None)",
    "let the parent trace": "syscall('ptrace', 0, 0, None, None)",
    "process_vm_readv": "syscall('process_vm_readv', target, iovec(), 1, iovec(), 1, 0)",
    "process_vm_writev": "syscall('process_vm_writev', target, iovec(), 1, iovec(), 1, 0)",
    "memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "memory of another": "open(f'/proc/{target}/mem', 'r+b')",
    "its own memory": "open('/proc/self/mem', 'rb')",
    "memory map of the parent": "open(f'/proc/{os.getppid()}/maps').read()",
    "open files of another": "os.listdir(f'/proc/{target}/fd')",
    "folder of another": "os.readlink(f'/proc/{target}/cwd')",
    "command line of another": "open(f'/proc/{target}/cmdline').read()",
    "list of processes": "os.listdir('/proc')",
    "kcmp": "syscall('kcmp', os.getpid(), target, 0, 0, 0)",
    "priority of another": "os.setpriority(os.PRIO_PROCESS, target, 19)",
    "affinity of another": "os.sched_setaffinity(target, {min(os.sched_getaffinity(0))})",
    "scheduler of another": "syscall('sched_setscheduler', target, 3, struct.pack('i', 0))",
    "scheduler attributes of another": "syscall('sched_setattr', target, struct.pack('IIQiIQQQ', 48, 3, 0, 0, 0, 0, 0, 0), 0)",
    "disk priority of another": "syscall('ioprio_set', 1, target, 3 << 13)",
    "limits of the parent": "syscall('prlimit64', os.getppid(), 7, struct.pack('QQ', 5, 5), None)",
    "limits of another": "syscall('prlimit64', target, 0, struct.pack('QQ', 1, 1), None)",
    "pages of another": "syscall('migrate_pages', target, 64, ctypes.byref(ctypes.c_ulong(1)), ctypes.byref(ctypes.c_ulong(1)))",
    "advice to another": "syscall('process_madvise', target, iovec(), 1, 20, 0)",
    "out of memory score": "open('/proc/self/oom_score_adj', 'w').write('1000')",
    # outliving, multiplying
    "death signal off": "done(libc.prctl(1, 0, 0, 0, 0))",
    "orphans to itself": "done(libc.prctl(36, 1, 0, 0, 0))",
    "traceable by all": "done(libc.prctl(0x59616d61, -1, 0, 0, 0))",
    "dumpable": "done(libc.prctl(4, 0, 0, 0, 0))",
    "session of its own": "posix.setsid()",
    "group of its own": "posix.setpgid(0, os.getppid())",
    "fork": "posix.fork() or os._exit(0)",
    "vfork by number": "syscall('vfork')",
    "fork by clone": "syscall('clone', 17, 0, 0, 0, 0) or os._exit(0)",
    "clone of another family": "syscall('clone', 0x8000 | 17, 0, 0, 0, 0) or os._exit(0)",
    "clone into namespaces": "syscall('clone', 0x3D0F00 | 0x10000000, 0, 0, 0, 0) or os._exit(0)",
    "clone3": "syscall('clone3', struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0), 64) or os._exit(0)",
    "posix_spawn": "posix.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "import importlib, subprocess; importlib.reload(subprocess).run(['/bin/true'])",
    "system": "posix.system('true') and done(-1)",
    "multiprocessing": "os.fork = posix.fork; os.getcwd = posix.getcwd; import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "exec": "posix.execv('/bin/true', ['true'])",
    "exec of set-uid": "posix.execv('/usr/bin/su', ['su'])",
    "exec from memory": "fd = syscall('memfd_create', b'x', 0); posix.execve(fd, ['x'], {})",
    "execveat": "syscall('execveat', -100, b'/bin/true', None, None, 0)",
    "exec of its own file": "open('p', 'w').write('#!/bin/sh'); posix.execv('./p', ['p'])",
    # files outside
    "write": "open(victim, 'w')",
    "append": "open(victim, 'a')",
    "create": "open(outside + '/new', 'x')",
    "empty by O_TRUNC": "os.open(module, os.O_RDONLY | os.O_TRUNC)",
    "empty by openat2": "syscall('openat2', -100, module.encode(), struct.pack('QQQ', os.O_RDONLY | os.O_TRUNC, 0, 0), 24)",
    "truncate": "posix.truncate(victim, 0)",
    "mkdir": "os.mkdir(outside + '/d')",
    "symlink outside": "os.symlink('/', outside + '/l')",
    "hard link into its folder": "os.link(victim, 'mine-now')",
    "hard link of Python's own file": "os.link(module, 'mine-too')",
    "unlink": "posix.unlink(victim)",
    "rename away": "posix.rename(victim, 'moved')",
    "rename over": "open('a', 'w').close(); posix.rename('a', victim)",
    "rename Python's own file": "posix.rename(module, module + '.old')",
    "remove a folder": "posix.rmdir(outside + '/empty')",
    "write by a symbolic link": "os.symlink(victim, 'link'); open('link', 'w')",
    "write by ..": "open('../' + os.path.relpath(victim, os.path.dirname(posix.getcwd())), 'w')",
    "write from another folder": "posix.chdir(outside); open('victim', 'w')",
    "chmod": "posix.chmod(victim, 0o777)",
    "chmod of what is open": "posix.fchmod(os.open(module, os.O_RDONLY), 0o777)",
    "chown": "posix.chown(victim, os.getuid(), os.getgid())",
    "utime": "os.utime(victim, (0, 0))",
    "utime of what is open": "os.utime(os.open(module, os.O_RDONLY), (0, 0))",
    "utimes": "done(libc.utimes(victim.encode(), None))",
    "setxattr": "os.setxattr(victim, 'user.x', b'1')",
    "setxattr of what is open": "os.setxattr(os.open(module, os.O_RDONLY), 'user.x', b'1')",
    "removexattr": "os.removexattr(victim, 'user.kept')",
    "read an attribute": "os.getxattr(victim, 'user.kept')",
    "file flags": "fcntl.ioctl(os.open(module, os.O_RDONLY), 0x40086602, struct.pack('Q', 0x40))",
    "file flags, extended": "fcntl.ioctl(os.open(module, os.O_RDONLY), 0x401C5820, bytes(28))",
    "mkfifo": "os.mkfifo(outside + '/fifo')",
    "device": "os.mknod(outside + '/device', 0o20666, os.makedev(1, 1))",
    "device in its folder": "os.mknod('device', 0o20666, os.makedev(1, 1))",
    "sqlite": "import sqlite3\ntry: sqlite3.connect(victim + '.db').execute('create table t (x)')\nexcept sqlite3.Error: done(-1) if ctypes.set_errno(1) is None or 1 else 0",
    "project folder": "open(project + '/intruder.py', 'w')",
    "shared memory folder": "open('/dev/shm/nanochat-sandbox-test', 'w')",
    "the other program's folder": "open(neighbour + '/intruder', 'w')",
    "write a terminal": "open('/dev/tty', 'w')",
    "open by handle": "syscall('name_to_handle_at', -100, victim.encode(), struct.pack('Ii', 128, 0) + bytes(128), ctypes.byref(ctypes.c_int()), 0)",
    "open_by_handle_at": "syscall('open_by_handle_at', -100, struct.pack('Ii', 8, 1) + bytes(128), 0)",
    # watching, reading
    "inotify": "syscall('inotify_init1', 0)",
    "fanotify": "syscall('fanotify_init', 0x200, 0)",
    "read": "open(victim).read()",
    "list": "os.listdir(outside)",
    "keys": "open(home + '/.ssh/id_ed25519').read()",
    "read by a symbolic link": "os.symlink(home, 'home'); open('home/.ssh/id_ed25519').read()",
    "users": "open('/etc/passwd').read()",
    "root folder": "os.listdir('/')",
    "project": "open(project + '/README.md').read()",
    "environment of the parent": "open(f'/proc/{os.getppid()}/environ').read()",
    "its own first environment": "open('/proc/self/environ').read()",
    "environment": "assert not any('swordfish' in value for value in os.environ.values()); done(-1) if ctypes.set_errno(1) is None or 1 else 0",
    "read stdin": "if not os.read(0, 100): raise PermissionError(errno.EPERM, 'nothing')",
    "terminal input": "open('/dev/tty').read()",
    "kernel log": "syscall('syslog', 3, ctypes.create_string_buffer(64), 64)",
    "devices": "os.listdir('/dev')",
    "disk": "open('/dev/vda', 'rb').read(1)",
    "machine settings": "open('/proc/sys/kernel/core_pattern', 'w')",
    "cgroups": "os.listdir('/sys/fs/cgroup')",
    # network
    "IPv4": "_socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(('127.0.0.1', tcp))",
    "IPv4 datagram": "_socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp))",
    "IPv6": "_socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
    "raw": "_socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet": "_socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300)",
    "netlink": "_socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "vsock": "_socket.socket(40, socket.SOCK_STREAM)",
    "crypto": "_socket.socket(38, socket.SOCK_SEQPACKET)",
    "unix stream": "_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(stream)",
    "unix datagram": "_socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', datagram)",
    "abstract": "_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect('\\0' + abstract)",
    "datagram from a pair": "_socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', datagram)",
    "seqpacket from a pair": "_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].sendto(b'x', datagram)",
    "address on a pair": "_socket.socketpair()[0].sendto(b'x', datagram)",
    "message on a pair": "_socket.socketpair()[0].sendmsg([b'x'], [], 0, datagram)",
    "connect a pair": "_socket.socketpair()[0].connect(stream)",
    "bind a pair": "_socket.socketpair()[0].bind('\\0' + abstract + 'x')",
    "files through a socket": "s = socket.socketpair(); socket.send_fds(s[0], [b'x'], [1])",
    "urllib": "import urllib.request\ntry: urllib.request.urlopen(f'http://127.0.0.1:{tcp}')\nexcept OSError as e: raise getattr(e, 'reason', e)",
    # memory and messages that outlive, and what else the kernel offers
    "shared memory": "syscall('shmget', 0x6e616e, 4096, 0o1600)",
    "semaphores": "syscall('semget', 0x6e616e, 1, 0o1600)",
    "message queue": "syscall('msgget', 0x6e616e, 0o1600)",
    "POSIX message queue": "syscall('mq_open', b'nanochat', 0o102, 0o600, None)",
    "add_key": "syscall('add_key', b'user', b'nanochat', b'x', 1, -5)",
    "keyctl": "syscall('keyctl', 0, -3, 1)",
    "request_key": "syscall('request_key', b'user', b'nanochat', None, -4)",
    "memfd": "syscall('memfd_create', b'x', 0)",
    "secret memory": "syscall('memfd_secret', 0)",
    "locked memory": "syscall('mlockall', 2)",
    "mmap locked": "mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x2000)",
    "huge pages": "mmap.mmap(-1, 2 ** 21, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)",
    "merge pages": "m = mmap.mmap(-1, 4096); m.madvise(12)",
    "memory policy": "syscall('mbind', None, 0, 0, None, 0, 0)",
    "barrier on all CPUs": "syscall('membarrier', 1, 0, 0)",
    "vmsplice": "syscall('vmsplice', os.pipe()[1], iovec(), 1, 0)",
    "flush all disks": "syscall('sync')",
    "io_uring": "syscall('io_uring_setup', 4, ctypes.create_string_buffer(120))",
    "userfaultfd": "syscall('userfaultfd', 1)",
    "bpf": "syscall('bpf', 0, struct.pack('IIII', 2, 4, 4, 1) + bytes(112), 128)",
    "perf": "syscall('perf_event_open', struct.pack('IIQ', 1, 128, 0) + bytes(112), 0, -1, -1, 0)",
    "personality": "syscall('personality', 0x0040000)",
    "another filter": "syscall('seccomp', 1, 0, struct.pack('HxxxxxxP', 0, 0))",
    "filter by prctl": "done(libc.prctl(22, 1, 0, 0, 0))",
    "another ruleset": "syscall('landlock_create_ruleset', struct.pack('Q', 1), 8, 0)",
    "unshare": "syscall('unshare', 0x10000000)",
    "unshare mounts": "syscall('unshare', 0x00020000)",
    "setns": "syscall('setns', os.open('/proc/self/ns/net', os.O_RDONLY), 0)",
    "chroot": "posix.chroot('.')",
    "mount": "syscall('mount', b'tmpfs', b'.', b'tmpfs', 0, None)",
    "make it writable again": "syscall('mount', None, b'/', None, 0x1020, None)",
    "mount_setattr": "syscall('mount_setattr', -100, b'/', 0x8000, struct.pack('4Q', 0, 1, 0, 0), 32)",
    "unmount its folder": "syscall('umount2', posix.getcwd().encode(), 2)",
    "pivot_root": "syscall('pivot_root', b'.', b'.')",
    "open_tree": "syscall('open_tree', -100, b'/', 1)",
    "fsopen": "syscall('fsopen', b'tmpfs', 0)",
    "quotas": "syscall('quotactl', 0x800002, None, 0, None)",
    "set the clock": "syscall('clock_settime', 0, struct.pack('qq', -1, -1))",
    "adjust the clock": "syscall('adjtimex', struct.pack('I', 0x8000) + bytes(252))",
    "host name": "syscall('sethostname', b'x', 65)",
    "swap": "syscall('swapon', b'none', 0)",
    "restart": "syscall('reboot', 0, 0, 0, None)",
    "kernel module": "syscall('init_module', None, 0, b'')",
    "another kernel": "syscall('kexec_load', 0, 999, None, 0)",
    "accounting": "syscall('acct', b'/none')",
    "hang up": "syscall('vhangup')",
    "become another user": "done(libc.setresuid(12345, 12345, 12345))",
    "groups": "done(libc.setgroups(0, None))",
    "take capabilities": "syscall('capset', struct.pack('Ii', 0x20080522, 0), struct.pack('6I', *[0xFFFFFFFF] * 6))",
    "x32 numbers": "done(libc.syscall(ctypes.c_long(0x40000000 + 41), 2, 1, 0))",
    "a call newer than the list": "syscall('newest')",
}

TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\n    assert double(4) == 8\ncheck(plus)"
PASSES = "def plus(x): return x + 1\ndef double(x): return 2 * x\n"
WRONG = "def plus(x): return None\ndef double(x): return None\n"
INSIDE = "def plus(x):\n    {}\ndef double(x): return None\n"  # what is done when the test calls

# Programs that fail TEST and try to hide it.
FORGERIES = {
    "sys.exit(0)": "import sys; sys.exit(0)",
    "sys.exit()": "import sys; sys.exit()",
    "SystemExit": "raise SystemExit(0)",
    "os._exit(0)": "import os; os._exit(0)",
    "sys.exit(0) in the call": INSIDE.format("import sys; sys.exit(0)"),
    "os._exit(0) in the call": INSIDE.format("import os; os._exit(0)"),
    "exit by system call": INSIDE.format("import ctypes; ctypes.CDLL(None)._exit(0)"),
    "exit handler": "import atexit, os; atexit.register(os._exit, 0)\n" + WRONG,
    "exit handler, then an error": "import atexit, os; atexit.register(os._exit, 0)\n1 / 0",
    "thread": "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.02), os._exit(0))).start()\ntime.sleep(5)",
    "timer": "import os, signal, time\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0)); signal.setitimer(signal.ITIMER_REAL, 0.02); time.sleep(5)",
    "excepthook": "import os, sys; sys.excepthook = lambda *_: os._exit(0)\n1 / 0",
    "destructor": "import os\nclass A:\n    def __del__(self): os._exit(0)\na = A(); del a",
    "signal to itself": INSIDE.format("import os, posix; posix.kill(os.getpid(), 9)"),
    "always equal": "class A:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef plus(x): return A()\ndouble = plus",
    "an int that is always equal": "class A(int):\n    def __eq__(self, other): return True\ndef plus(x): return A()\ndouble = plus",
    "mock.ANY": "from unittest.mock import ANY\ndef plus(x): return ANY\ndouble = plus",
    "a pickle that runs code": "import os\nclass A:\n    def __reduce__(self): return os._exit, (0,)\ndef plus(x): return A()\ndouble = plus",
    "a class": "def plus(x): return type('A', (), {'__eq__': lambda *_: True})\ndouble = plus",
    "its own check": "def check(candidate): pass\nassert_ = None\n" + WRONG,
    "its own built-ins": "import builtins\nbuiltins.AssertionError = SystemExit\nbuiltins.print = builtins.isinstance = builtins.abs = lambda *_: True\n" + WRONG,
    "names of built-ins": "def AssertionError(*_): pass\ndef len(x): return 0\n" + WRONG,
    "exception that is none": "class E(BaseException): pass\ndef plus(x): raise E\ndef double(x): return 1",
    "SystemExit by name": "class SystemExit(Exception): pass\ndef plus(x): raise SystemExit(0)\ndouble = plus",
    "frames": INSIDE.format("import sys\n    f = sys._getframe()\n    while f:\n        f.f_globals.update(check=print); f.f_locals.clear(); f = f.f_back"),
    "trace that skips the assertions": "import sys, threading\ndef trace(frame, event, arg):\n    return trace\nsys.settrace(trace); threading.settrace(trace)\n" + WRONG,
    "search of the memory": INSIDE.format(
        "import gc\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'check' in o: o['check'] = lambda *_: None\n    return 2"),
    "answers by itself": """
import os, pickle, stat
for fd in range(3, 64):
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode): os.write(fd, pickle.dumps(["plus", "double"]) + pickle.dumps((None, None)) * 9)
    except OSError: pass
os._exit(0)""",
    "answers that run code": """
import os, stat
for fd in range(3, 64):
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode): os.write(fd, b"cos\\n_exit\\n(I0\\ntR.")
    except OSError: pass
os._exit(0)""",
    "answers that change a class": """
import os, pickle, stat
forged = b"(N" b"cfractions\\nFraction\\n" b"(N}(X\\x06\\x00\\x00\\x00__eq__cbuiltins\\nslice\\nutb" b"(I1\\ntR" b"t."
for fd in range(3, 64):
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode): os.write(fd, pickle.dumps(["plus", "double"]) + forged * 9)
    except OSError: pass
os._exit(0)""",
    "answers without end": """
import os, stat
for fd in range(3, 64):
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode): os.write(fd, b"\\x80\\x04B\\xff\\xff\\xff\\x7f")
    except OSError: pass
os._exit(0)""",
    "closes the pipes": "import os; os.closerange(3, 64)\n" + WRONG,
    "success printed": "print('passed', flush=True); print('OK' * 100, flush=True)\n" + WRONG,
    "the test's process by number": INSIDE.format("import os, posix\n    for d in range(-9, 9):\n        if d: posix.kill(os.getpid() + d, 9)"),
    "asserts are off": "import sys; sys.flags = None\n__debug__ if True else 0\n" + WRONG,
    "generator": "def plus(x): yield x + 1\ndouble = plus",
    "not a number": "def plus(x): return float('nan')\ndouble = plus",
    "half of it": "def plus(x): return x + 1\ndef double(x): return 7",
}

LOOP = "\nwhile True: pass"
# name: program, arguments, what the error has to contain (each ends within the time limit, or is killed: "no end")
BOMBS = {
    "loop": ("while True: pass", {"timeout": 0.3}, "no end"),
    "sleep": ("import time; time.sleep(100)", {"timeout": 0.3}, "no end"),
    "all signals ignored": ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass" + LOOP,
                            {"timeout": 0.3}, "no end"),
    "all signals blocked": ("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))" + LOOP, {"timeout": 0.3}, "no end"),
    "BaseException caught": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", {"timeout": 0.3}, "no end"),
    "stops itself": ("import os, posix, signal; posix.kill(os.getpid(), signal.SIGSTOP)", {"timeout": 0.3}, "no end"),
    "thread that goes on": ("import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()", {"timeout": 0.3}, "no end"),
    "exit handler that waits": ("import atexit, time; atexit.register(time.sleep, 100)", {"timeout": 0.3}, "no end"),
    "loops in C": ("import re; re.match(r'(a+)+$', 'a' * 64 + 'b')", {"timeout": 0.3}, "no end"),
    "slow sum": ("sum(range(10 ** 12))", {"timeout": 0.3}, "no end"),
    "memory by pieces": ("x = []\nwhile True: x.append(bytearray(10 ** 7))", {}, "MemoryError"),
    "memory at once": ("x = 'a' * (1 << 40)", {}, "MemoryError"),
    "memory by doubling": ("x = [0]\nwhile True: x += x", {}, "MemoryError"),
    "memory by mmap": ("import mmap; mmap.mmap(-1, 1 << 30)", {}, "memory"),
    "stack": ("import sys; sys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nx = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)", {"timeout": 1}, ""),
    "threads without end": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", {}, "start new thread"),
    "fork bomb": ("import posix\nwhile True: posix.fork()", {}, "not permitted"),
    "fork bomb that tries again": ("import posix\nwhile True:\n    try: posix.fork()\n    except OSError: pass", {"timeout": 0.3}, "no end"),
    "a large file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(10 ** 6))", {}, "File too large"),
    "a sparse file": ("open('big', 'wb').truncate(1 << 40)", {}, "File too large"),
    "fallocate": ("import os; os.posix_fallocate(os.open('big', os.O_RDWR | os.O_CREAT), 0, 1 << 30)", {}, "File too large"),
    "many large files": ("for i in range(10 ** 6): open(f'{i}', 'wb').write(bytes(15 << 20))", {}, ("No space left", "more than 64 MiB")),
    "many files": ("for i in range(10 ** 6): open(f'{i}', 'w')", {}, ("No space left", "more than 64 MiB")),
    "many folders": ("import os\nfor i in range(10 ** 6): os.mkdir(f'{i}')", {}, ("No space left", "more than 64 MiB")),
    "deep folders": ("import os, posix\nwhile True:\n    os.mkdir('a'); posix.chdir('a')", {}, ("No space left", "more than 64 MiB", "too long")),
    "many names of a file": ("import os\nopen('a', 'w')\nfor i in range(10 ** 6): os.link('a', f'{i}')", {}, ("No space left", "more than 64 MiB")),
    "many open files": ("x = [open('a', 'w') for _ in range(10 ** 6)]", {}, "Too many open files"),
    "flood of output": ("while True: print('x' * 10 ** 6)", {}, "File too large"),
    "flood of errors": ("import sys\nwhile True: sys.stderr.write('x' * 10 ** 6)", {}, ""),
    "core dump": ("import os; os.abort()", {}, "SIGABRT"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", {}, "SIGSEGV"),
    "input": ("input()", {}, "EOFError"),
}
if os.uname().machine == "x86_64":
    BOMBS["32 bits"] = (  # getpid by interrupt 0x80
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7); m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())", {}, "SIGSYS")


# -----------------------------------------------------------------------------
# The runner


class Outside:
    """What a program could reach: a folder, servers, a process; and whether they are as they were."""

    def __init__(self, directory: Path):
        self.directory, self.signals = directory, []
        outside, packages, home, neighbour = (directory / name for name in ("outside", "site-packages", "home", "nanochat-sandbox-other"))
        for folder in (outside, outside / "empty", packages, home / ".ssh", neighbour):
            folder.mkdir(parents=True)
        self.victim, self.module = outside / "victim", packages / "module.py"
        for path in (self.victim, self.module, home / ".ssh" / "id_ed25519"):
            path.write_text("swordfish")
        try:
            os.setxattr(self.victim, "user.kept", b"1")
        except OSError:  # not on this file system
            pass
        self.process = subprocess.Popen(["sleep", "100"], start_new_session=True)
        self.servers = {"tcp": socket.socket(socket.AF_INET, socket.SOCK_STREAM), "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
                        "stream": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), "datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
                        "abstract": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)}
        addresses = {"tcp": ("127.0.0.1", 0), "udp": ("127.0.0.1", 0), "stream": str(directory / "stream"), "datagram": str(directory / "datagram"),
                     "abstract": "\0" + str(directory)}
        for name, server in self.servers.items():
            server.bind(addresses[name])
            server.setblocking(False)
            if server.type == socket.SOCK_STREAM:
                server.listen()
        self.targets = {"outside": str(outside), "victim": str(self.victim), "module": str(self.module), "home": str(home), "neighbour": str(neighbour),
                        "project": str(Path(__file__).parents[1]), "target": self.process.pid, "stream": str(directory / "stream"),
                        "datagram": str(directory / "datagram"), "abstract": str(directory), "NUMBERS": NUMBERS,
                        **{name: self.servers[name].getsockname()[1] for name in ("tcp", "udp")}}
        for number in (signal.SIGUSR1, signal.SIGIO, signal.SIGCONT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self.signals.append(number))
        self.before = self.state()

    def state(self) -> dict:
        received = []
        for name, server in self.servers.items():
            try:
                received.append((name, server.accept() if server.type == socket.SOCK_STREAM else server.recv(1)))
            except BlockingIOError:
                pass
        pid, running = self.process.pid, self.process.poll() is None
        state = Path(f"/proc/{pid}/stat").read_text().split() if running else None
        files = []
        for path in sorted(self.directory.rglob("*")):
            status = path.lstat()
            attributes = os.listxattr(path) if path.is_file() else []
            files.append((str(path), status.st_mode, status.st_uid, status.st_nlink, status.st_size, status.st_mtime_ns, attributes))
        return {"files": files, "content": [path.read_text() for path in (self.victim, self.module) if path.exists()], "received": received,
                "process": state and (state[2] in "Tt", state[18], os.sched_getaffinity(pid), os.sched_getscheduler(pid), Path(f"/proc/{pid}/limits").read_text()),
                "signals": list(self.signals), "shm": os.path.exists("/dev/shm/nanochat-sandbox-test"),
                "ipc": [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "sem", "msg") if os.path.exists(f"/proc/sysvipc/{kind}")]}

    def changes(self) -> list[str]:
        after = self.state()
        return [f"{key}: {value} -> {after[key]}" for key, value in self.before.items() if after[key] != value]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for server in self.servers.values():
            server.close()


def escapes() -> dict:
    """For each of ESCAPES how it ended: an errno, or what it raised, or None where it worked."""
    with tempfile.TemporaryDirectory() as directory:
        outside = Outside(Path(directory))
        sys.path.append(str(Path(directory) / "site-packages"))
        os.environ["SECRET"] = "swordfish"
        program = PRELUDE.format(targets=json.dumps(outside.targets)) + textwrap.dedent("""
            for name, code in %r.items():
                try: exec(code, dict(globals())); outcome = None
                except OSError as error: outcome = error.errno
                except BaseException as error: outcome = f"{type(error).__name__}: {error}"
                print(json.dumps((name, outcome)), flush=True)
        """) % {name: textwrap.dedent(code) for name, code in ESCAPES.items()}
        try:
            result = execute_code(program, timeout=60)
            outcomes = dict(map(json.loads, result.stdout.splitlines()))
            return {"outcomes": outcomes, "success": result.success, "stderr": result.stderr[-2000:], "changes": outside.changes()}
        finally:
            outside.close()


def bare() -> None:
    """Prints how the escapes end without a sandbox, but for those that would hurt; a process each."""
    harmful = {"kill all", "flush all disks", "restart", "accounting", "host name", "hang up", "project folder", "kill the parent", "limits of the parent"}
    for name, code in ESCAPES.items():
        if name in harmful:
            continue
        with tempfile.TemporaryDirectory() as directory:
            os.mkdir(f"{directory}/own")
            outside = Outside(Path(directory))
            program = PRELUDE.format(targets=json.dumps(outside.targets)) + f"exec({textwrap.dedent(code)!r})"
            process = subprocess.Popen([sys.executable, "-c", program], cwd=f"{directory}/own", stderr=subprocess.PIPE, text=True,
                                       env={**os.environ, "SECRET": "swordfish"}, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                error = (process.communicate(timeout=3)[1].splitlines() or [""])[-1]
            except subprocess.TimeoutExpired:  # it waits for a server to answer
                error = ""
                process.kill()
                process.wait()
            print(f"{'refused' if process.returncode == 1 else 'works'}: {name} {error} {[change.split(':')[0] for change in outside.changes()]}", flush=True)
            outside.close()


def running(parent: int) -> list[str]:
    """Sandboxes that a process has started and that go on; a dead one that nobody has asked for yet has no command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        script = next((i for i, argument in enumerate(arguments) if Path(argument).name.startswith("sandbox")), None)
        if script is not None and arguments[script + 2:script + 3] == [str(parent)]:  # the script, its role, who started it
            found.append(path.parent.name)
    return found


def forgeries() -> dict:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda code: execute_code(code, test=TEST, timeout=20), [PASSES, *FORGERIES.values()])
        return dict(zip(["", *FORGERIES], map(dataclasses.asdict, results), strict=True))


def bombs() -> dict:
    results = {name: execute_code(code, **arguments) for name, (code, arguments, _) in BOMBS.items()}
    return {"outcomes": {name: {**dataclasses.asdict(result), "stdout": len(result.stdout), "stderr": len(result.stderr)}
                         for name, result in results.items()}, "running": running(os.getpid())}


def without_mounts(directory: Path) -> Path:
    """The sandbox's script on a system that refuses namespaces."""
    path = directory / "sandbox_without_mounts.py"
    text = Path(sandbox.__file__).read_text(encoding="utf-8")
    path.write_text(text.replace('if __name__ == "__main__":', "def _mount_own_folder(folder):\n    raise OSError\n\n" 'if __name__ == "__main__":'))
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as copy:
        if sys.argv[2:] == ["mount"]:
            sandbox.__file__ = str(without_mounts(Path(copy)))
        print(json.dumps({"escapes": escapes, "forgeries": forgeries, "bombs": bombs, "bare": bare}[sys.argv[1]]()))
