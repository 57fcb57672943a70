/* What processes do that fsnap must see through: one behaviour per name. Each says "ready" when it has begun. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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
