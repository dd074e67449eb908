"""The system calls that a program may make, with their numbers on the processors that are known.

What is left out on purpose, beside everything that administers a machine: ptrace, process_vm_*, pidfd_* and kcmp (other
processes), unshare, setns, mount* and clone3 (namespaces; glibc falls back to clone, whose flags can be looked at),
memfd_create and System V memory (memory that no limit counts), io_uring, bpf, perf_event_open, userfaultfd, keyctl
(attack surface of the kernel). Source of the numbers: the kernel's unistd_64.h and asm-generic/unistd.h.
"""

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of the kernel's audit.h."""

# name, number on x86_64, number on aarch64 (-: there is none)
_TABLE = """
read 0 63,  write 1 64,  readv 19 65,  writev 20 66,  pread64 17 67,  pwrite64 18 68,  preadv 295 69,  pwritev 296 70,
preadv2 327 286,  pwritev2 328 287,  open 2 -,  openat 257 56,  creat 85 -,  close 3 57,  close_range 436 436,
stat 4 -,  fstat 5 80,  lstat 6 -,  newfstatat 262 79,  statx 332 291,  statfs 137 43,  fstatfs 138 44,  access 21 -,
faccessat 269 48,  faccessat2 439 439,  readlink 89 -,  readlinkat 267 78,  getcwd 79 17,  chdir 80 49,  fchdir 81 50,
mkdir 83 -,  mkdirat 258 34,  rmdir 84 -,  unlink 87 -,  unlinkat 263 35,  rename 82 -,  renameat 264 38,
renameat2 316 276,  link 86 -,  linkat 265 37,  symlink 88 -,  symlinkat 266 36,  truncate 76 45,  ftruncate 77 46,
fallocate 285 47,  chmod 90 -,  fchmod 91 52,  fchmodat 268 53,  umask 95 166,  utime 132 -,  utimes 235 -,
utimensat 280 88,  futimesat 261 -,  getdents 78 -,  getdents64 217 61,  lseek 8 62,  dup 32 23,  dup2 33 -,
dup3 292 24,  pipe 22 -,  pipe2 293 59,  fcntl 72 25,  flock 73 32,  fsync 74 82,  fdatasync 75 83,  sendfile 40 71,
copy_file_range 326 285,  poll 7 -,  ppoll 271 73,  select 23 -,  pselect6 270 72,  epoll_create 213 -,
epoll_create1 291 20,  epoll_ctl 233 21,  epoll_wait 232 -,  epoll_pwait 281 22,  eventfd 284 -,  eventfd2 290 19,
timerfd_create 283 85,  timerfd_settime 286 86,  timerfd_gettime 287 87,  signalfd 282 -,  signalfd4 289 74,
ioctl 16 29,  mmap 9 222,  munmap 11 215,  mprotect 10 226,  mremap 25 216,  madvise 28 233,  msync 26 227,
mincore 27 232,  brk 12 214,  rt_sigaction 13 134,  rt_sigprocmask 14 135,  rt_sigreturn 15 139,
rt_sigpending 127 136,  rt_sigtimedwait 128 137,  rt_sigsuspend 130 133,  sigaltstack 131 132,  pause 34 -,
nanosleep 35 101,  clock_nanosleep 230 115,  clock_gettime 228 113,  clock_getres 229 114,  gettimeofday 96 169,
time 201 -,  times 100 153,  getitimer 36 102,  setitimer 38 103,  alarm 37 -,  getpid 39 172,  getppid 110 173,
gettid 186 178,  getuid 102 174,  geteuid 107 175,  getgid 104 176,  getegid 108 177,  getresuid 118 148,
getresgid 120 150,  getgroups 115 158,  getpgid 121 155,  getpgrp 111 -,  getsid 124 156,  setpgid 109 154,
setsid 112 157,  kill 62 129,  tgkill 234 131,  tkill 200 130,  fork 57 -,  vfork 58 -,  execve 59 221,  wait4 61 260,
waitid 247 95,  exit 60 93,  exit_group 231 94,  futex 202 98,  set_robust_list 273 99,  get_robust_list 274 100,
set_tid_address 218 96,  rseq 334 293,  arch_prctl 158 -,  prctl 157 167,  getrandom 318 278,  uname 63 160,
sysinfo 99 179,  getrlimit 97 163,  setrlimit 160 164,  prlimit64 302 261,  getrusage 98 165,  getpriority 140 141,
sched_yield 24 124,  sched_getaffinity 204 123,  sched_setaffinity 203 122,  getcpu 309 168,  membarrier 324 283,
restart_syscall 219 128,  connect 42 203,  accept 43 202,  accept4 288 242,  bind 49 200,  listen 50 201,
sendto 44 206,  recvfrom 45 207,  sendmsg 46 211,  recvmsg 47 212,  shutdown 48 210,  getsockname 51 204,
getpeername 52 205,  setsockopt 54 208,  getsockopt 55 209,  clone 56 220,  socket 41 198,  socketpair 53 199
"""


def allowed_calls(machine: str) -> dict[str, int]:
    """Name and number of every allowed call on `machine`, a key of ARCHITECTURES."""
    column = 1 + list(ARCHITECTURES).index(machine)
    rows = [row.split() for row in _TABLE.replace("\n", " ").split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}
