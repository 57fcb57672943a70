/* What processes do that fsnap must see through: one behaviour per name. Each says "ready" when it has begun. */
#define _GNU_SOURCE
#include <alloca.h>
#include <err.h>
#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static void ready(void)
{
	if (write(1, "ready\n", 6) != 6)
		err(1, "write");
}

static int open_for(const char *path, int flags)
{
	int fd = open(path, flags, 0644);
	if (fd < 0)
		err(1, "%s", path);
	return fd;
}

static void *append(void *path)
{
	int fd = open_for(path, O_WRONLY | O_CREAT | O_APPEND);
	for (;;) {
		if (write(fd, "x", 1) != 1)
			err(1, "write");
		usleep(200);
	}
}

static void threads(int count, char *dir)
{
	pthread_t thread;
	for (int i = 0; i < count; i++) {
		char *path;
		if (asprintf(&path, "%s/%d", dir, i) < 0)
			err(1, "asprintf");
		pthread_create(&thread, NULL, append, path);
	}
	ready();
}

static void map(const char *path)
{
	int fd = open_for(path, O_RDWR | O_CREAT);
	if (ftruncate(fd, 4096))
		err(1, "ftruncate");
	volatile int *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shared == MAP_FAILED)
		err(1, "mmap");
	close(fd);
	ready();
	for (;;)
		++*shared;
}

static void vforks(void)
{
	ready();
	for (;;) {
		pid_t child = vfork();
		if (child == 0) {
			execl("/bin/true", "true", (char *)NULL);
			_exit(127);
		}
		waitpid(child, NULL, 0);
	}
}

static void storm(const char *path)
{
	int fd = open_for(path, O_WRONLY | O_CREAT | O_APPEND);
	signal(SIGCHLD, SIG_IGN);
	ready();
	for (;;) {
		if (fork() == 0) {
			for (int i = 0; i < 5; i++) {
				if (fork() == 0) {
					usleep(3000);
					if (write(fd, "x", 1) != 1)
						_exit(1);
					_exit(0);
				}
				usleep(500);
			}
			_exit(0);
		}
		usleep(1000);
	}
}

/* Keeps a number in memory and the same number in a file. */
static void count(const char *path)
{
	setsid();
	int fd = open_for(path, O_RDWR | O_CREAT);
	ready();
	close(1);
	open_for("/dev/null", O_RDWR);
	for (unsigned long number = 1;; number++) {
		char text[32];
		snprintf(text, sizeof text, "%020lu\n", number);
		if (pwrite(fd, text, 21, 0) != 21)
			err(1, "pwrite");
		usleep(500);
	}
}

/* Whoever reads its command line waits for a page that never comes. */
__attribute__((noinline)) static void no_command_line(char **argv)
{
	open_for(argv[2], O_WRONLY | O_CREAT);
	/* The page at the top of the stack that the command line begins on; what runs lies far below it. */
	char *page = (char *)((unsigned long)argv[0] & ~4095UL);
	if (argv[0] - (char *)__builtin_frame_address(0) < 8192)
		errx(1, "the frame is too near");
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register missing = {
		.range = { .start = (unsigned long)page, .len = 4096 },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) ||
	    mmap(page, 4096, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != page ||
	    ioctl(fd, UFFDIO_REGISTER, &missing))
		_exit(1);
	ready();
	for (;;)
		pause();
}

/* A process with one of each: `inside` is a volume, `outside` is none. Its child stays in `outside`. */
static void everything(const char *inside, const char *outside)
{
	if (chdir(inside))
		err(1, "chdir");
	int data = open_for("data", O_RDWR | O_CREAT);
	if (pwrite(data, "0123456789", 10, 0) != 10 || lseek(data, 7, SEEK_SET) != 7)
		err(1, "data");
	dup2(data, 50);
	dup2(open_for("a name (deleted)", O_WRONLY | O_CREAT | O_APPEND), 51);
	dup2(open_for("gone", O_RDWR | O_CREAT), 52);
	unlink("gone");
	dup2(open_for("/etc/passwd", O_RDONLY), 53);
	dup2(open_for("/proc/self/comm", O_WRONLY), 54);
	dup2(memfd_create("memory", 0), 55);
	/* Memory of other kinds, as far as the kernel has it. */
	dup2(memfd_create("huge", MFD_HUGETLB), 56);
	dup2(syscall(SYS_memfd_secret, 0), 57);
	unsigned long ring = 0;
	syscall(SYS_io_setup, 1, &ring);
	if (chdir(outside))
		err(1, "chdir");
	dup2(open_for("log", O_WRONLY | O_CREAT), 60);
	int mapped = open_for("mapped", O_RDWR | O_CREAT);
	if (ftruncate(mapped, 4096) || mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0) == MAP_FAILED)
		err(1, "mapped");
	close(mapped);
	unlink("mapped");
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	snprintf(name.sun_path, sizeof name.sun_path, "%s/socket", outside);
	int bound = socket(AF_UNIX, SOCK_STREAM, 0);
	if (bind(bound, (struct sockaddr *)&name, sizeof name) || listen(bound, 1))
		err(1, "bind");
	dup2(bound, 61);
	for (int fd = 3; fd < 50; fd++)
		close(fd);
	if (fork() == 0)
		for (;;)
			pause();
	if (chdir(inside))
		err(1, "chdir");
	ready();
}

int main(int argc, char **argv)
{
	if (argc < 2)
		errx(2, "which behaviour?");
	const char *what = argv[1], *path = argc > 2 ? argv[2] : "";
	if (!strcmp(what, "append")) {
		ready();
		append((void *)path);
	} else if (!strcmp(what, "threads")) {
		threads(atoi(argv[3]), argv[2]);
	} else if (!strcmp(what, "first-thread-ends")) {
		threads(2, argv[2]);
		pthread_exit(NULL);
	} else if (!strcmp(what, "map")) {
		map(path);
	} else if (!strcmp(what, "no-command-line")) {
		/* Far below the command line. */
		char *room = alloca(65536);
		memset(room, 0, 65536);
		no_command_line(argv);
	} else if (!strcmp(what, "everything")) {
		everything(path, argv[3]);
	} else if (!strcmp(what, "vforks")) {
		vforks();
	} else if (!strcmp(what, "vfork-held")) {
		ready();
		if (vfork() == 0) {
			sleep(60);
			_exit(0);
		}
	} else if (!strcmp(what, "storm")) {
		storm(path);
	} else if (!strcmp(what, "count")) {
		count(path);
	} else if (!strcmp(what, "read")) {
		open_for(path, O_RDONLY);
		ready();
	} else if (!strcmp(what, "write")) {
		open_for(path, O_WRONLY | O_CREAT);
		ready();
	} else if (!strcmp(what, "write-unlinked")) {
		open_for(path, O_WRONLY | O_CREAT);
		unlink(path);
		ready();
	} else if (!strcmp(what, "directory")) {
		open_for(path, O_RDONLY | O_DIRECTORY);
		ready();
	} else if (!strcmp(what, "cwd")) {
		if (chdir(path))
			err(1, "chdir");
		ready();
	} else if (!strcmp(what, "chroot")) {
		if (chroot(path) || chdir("/"))
			err(1, "chroot");
		ready();
	} else if (!strcmp(what, "user")) {
		if (setgroups(0, NULL) || setgid(atoi(path)) || setuid(atoi(path)))
			err(1, "setuid");
		ready();
	} else if (!strcmp(what, "stopped-child")) {
		pid_t child = fork();
		if (child == 0)
			for (;;)
				pause();
		kill(child, SIGSTOP);
		waitpid(child, NULL, WUNTRACED);
		ready();
	} else {
		errx(2, "%s: no such behaviour", what);
	}
	for (;;)
		pause();
}
