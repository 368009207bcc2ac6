// Command add adds amounts in one session and prints the total after each, in its own line:
//
//	go run ./add [-timeout 30s] [-window 64] [-one] HOST:PORT AMOUNT...
//
// -one waits for each total before it sends the next amount.
package main

import (
	"flag"
	"fmt"
	"log"
	"strconv"
	"time"

	"counter"
)

func main() {
	log.SetFlags(0)
	timeout := flag.Duration("timeout", 30*time.Second, "for all of it")
	window := flag.Int("window", 64, "frames that may be unanswered")
	one := flag.Bool("one", false, "one after the other")
	flag.Parse()
	if flag.NArg() < 2 {
		log.Fatal("add HOST:PORT AMOUNT...")
	}
	var amounts []uint64
	for _, text := range flag.Args()[1:] {
		amount, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			log.Fatal(err)
		}
		amounts = append(amounts, amount)
	}
	client, err := counter.Dial(flag.Arg(0), counter.Options{Window: *window, Timeout: *timeout})
	if err != nil {
		log.Fatal(err)
	}
	size := len(amounts)
	if *one {
		size = 1
	}
	for ; len(amounts) > 0; amounts = amounts[size:] {
		totals, err := client.AddAll(amounts[:size])
		for _, total := range totals {
			fmt.Println(total)
		}
		if err != nil {
			log.Fatal(err)
		}
	}
	if err := client.Close(); err != nil {
		log.Print("the session was not ended: ", err)
	}
}
